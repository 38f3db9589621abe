"""Measured effects in a database: one row per minute, artifact, op, preset and tenant, and beside it one for each arm
of a roll-out that the completions belong to.

The rows lie in a database of their own: it is written in the background, may be lost without harm, and a lock on it
must not touch the library.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from sqlalchemy import ColumnElement, Connection, Float, Integer, String, func, inspect, select
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from server.effects.report import ALL, EVERY
from steering.language.errors import TrimtabError
from steering.language.finite import not_finite
from vectors.library.beside import Beside, metadata
from vectors.library.spaces import HOUSE, READER

log = structlog.get_logger("trimtab.effects")
MINUTE_S = 60
MIGRATIONS = Path(__file__).parent / "migrations"
# Of a database from before there were migrations, which holds the tables of the first one.
FIRST_REVISION = "0001"
# Minute, artifact, op, preset, tenant, roll-out and arm of a row.
Key = tuple[int, str, str, str, str, str, str]


class EffectsUnavailable(TrimtabError):
    """The database of measured effects cannot be used. Requests do not need it."""

    code = "effects_unavailable"


class RowRefused(EffectsUnavailable):
    """The database works, and does not take a row."""


class Base(DeclarativeBase):
    metadata = metadata()


class EffectMinute(Base):
    """Completions of one minute: means over them of the means over their tokens; p50 and p95 over completions.

    tenant: None of a former version, which did not record it, where no name tells. rollout, arm: "" in the rows that
    count every completion; a completion that belongs to an arm is counted in one of those and in one of the arm.
    """

    __tablename__ = "effect_minutes"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    minute: Mapped[int] = mapped_column(Integer, index=True)
    artifact: Mapped[str] = mapped_column(String(128), index=True)
    op: Mapped[str] = mapped_column(String(32))
    preset: Mapped[str] = mapped_column(String(128), index=True)
    completions: Mapped[int] = mapped_column(Integer)
    tokens: Mapped[int] = mapped_column(Integer)
    kl_mean: Mapped[float] = mapped_column(Float)
    kl_p50: Mapped[float] = mapped_column(Float)
    kl_p95: Mapped[float] = mapped_column(Float)
    entropy_change: Mapped[float] = mapped_column(Float)
    top1_changed: Mapped[float] = mapped_column(Float)
    repetition: Mapped[float] = mapped_column(Float)
    length: Mapped[float | None] = mapped_column(Float)
    base_ended: Mapped[float | None] = mapped_column(Float)
    tenant: Mapped[str | None] = mapped_column(String(64), index=True)
    rollout: Mapped[str] = mapped_column(String(32), server_default="", index=True)
    arm: Mapped[str] = mapped_column(String(16), server_default="")


@dataclass(frozen=True)
class Sample:
    """One measured completion, for one intervention or (artifact and op "all") the whole spec. tenant: whose it is.
    rollout, arm: where it is counted for an arm, too."""

    minute: int
    artifact: str
    op: str
    preset: str
    tokens: int
    kl: float
    entropy_change: float
    top1_changed: float
    repetition: float
    length: int
    base_ended: float
    tenant: str
    rollout: str = EVERY.rollout
    arm: str = EVERY.arm


@dataclass(frozen=True)
class Total:
    """Rows of a group taken together, weighted by completions. p50, p95: of the minutes' own, weighted likewise.

    length, base_ended: None where rows of a former version, which did not record them, are among these. first, last:
    start of the first and of the last minute among them, in seconds since 1970.
    """

    artifact: str | None
    op: str | None
    preset: str | None
    minute: int | None
    tenant: str | None
    rollout: str | None
    arm: str | None
    completions: int
    tokens: int
    kl_mean: float
    kl_p50: float
    kl_p95: float
    entropy_change: float
    top1_changed: float
    repetition: float
    length: float | None
    base_ended: float | None
    first: int
    last: int


MEANS = ("kl_mean", "kl_p50", "kl_p95", "entropy_change", "top1_changed", "repetition", "length",
         "base_ended")
GROUPS = {"artifact": ("artifact", "op"), "preset": ("preset",), "minute": ("minute",), "tenant": ("tenant",),
          "arm": ("rollout", "arm"), "all": ("artifact", "op", "preset")}


@dataclass(frozen=True)
class Which:
    """Which rows are asked for.

    since, until: seconds since 1970; minutes that begin in [since, until). artifact, preset, tenant, rollout, arm: only
    theirs; without a roll-out the rows that count every completion, unless they are grouped by arm.
    """

    since: int | None = None
    until: int | None = None
    artifact: str | None = None
    preset: str | None = None
    tenant: str | None = None
    rollout: str | None = None
    arm: str | None = None

    def conditions(self, table: Any, names: Sequence[str], whole: Sequence[str]) -> list[ColumnElement[bool]]:
        """What the rows of a table must be, for groups by `names`, so that no group counts a completion twice, and for
        who asks. whole: what the artifact is called of what counts a completion once."""
        found: list[ColumnElement[bool]] = []
        if self.since is not None:
            found.append(table.minute >= self.since // MINUTE_S)
        if self.until is not None:
            found.append(table.minute < -(-self.until // MINUTE_S))
        if self.artifact is None and "artifact" not in names:
            # A completion has a row for the whole spec and one for each intervention. Only the first is counted.
            found.append(table.artifact.in_(whole))
        if self.rollout is None:
            found.append(table.rollout != EVERY.rollout if "arm" in names else table.rollout == EVERY.rollout)
        for name in ("artifact", "preset", "tenant", "rollout", "arm"):
            if (value := getattr(self, name)) is not None:
                found.append(getattr(table, name) == value)
        tenant = READER.get().tenant
        if tenant not in (None, HOUSE):
            found.append(table.tenant == tenant)
        return found


ALL_ROWS = Which()


class EffectStore:
    """Written in the background. Methods raise EffectsUnavailable for whatever the database complains about."""

    def __init__(self, url: str) -> None:
        self.beside = Beside(url, "effects", MIGRATIONS, _refusal, found=_unrecorded)
        self.session = self.beside.session

    def close(self) -> None:
        self.beside.close()

    def write(self, samples: Sequence[Sample]) -> int:
        """Add the samples as minute rows. Returns how many were refused: one that is not finite, or a row that the
        database will not take, costs itself alone. Raises EffectsUnavailable, and writes nothing, if none can be."""
        groups: dict[Key, list[Sample]] = {}
        refused = 0
        for sample in samples:
            numbers = asdict(sample)
            if None in numbers.values() or any(not_finite(numbers)):
                refused += 1
            else:
                groups.setdefault((sample.minute, sample.artifact, sample.op, sample.preset, sample.tenant,
                                   sample.rollout, sample.arm), []).append(sample)
        try:
            with self.session() as session:
                session.add_all(_row(key, found) for key, found in groups.items())
        except RowRefused:
            # One of the rows was refused. Each is written on its own then, so that no other is lost with it.
            for key, found in groups.items():
                try:
                    with self.session() as session:
                        session.add(_row(key, found))
                except RowRefused as error:
                    refused += len(found)
                    log.warning("effect_row_refused", artifact=key[1], preset=key[3], error=error.message)
        return refused

    def totals(self, *, group: str, limit: int = 1000, which: Which = ALL_ROWS) -> list[Total]:
        """Effects by group, a key of `GROUPS`, largest KL first (by minute: newest first). No row counts a completion
        twice.

        Raises:
            EffectsUnavailable.
        """
        names = GROUPS[group]
        if which.artifact is not None and "op" not in names:
            # A completion may use an artifact with more than one op.
            names = (*names, "op")
        columns: list[Any] = [getattr(EffectMinute, name) for name in names]
        weight = EffectMinute.completions
        means: list[Any] = [func.sum(getattr(EffectMinute, name) * weight) / func.sum(weight) for name in MEANS]
        query = select(*columns, func.min(EffectMinute.minute), func.max(EffectMinute.minute), func.sum(weight),
                       func.sum(EffectMinute.tokens), *means)
        query = query.where(*which.conditions(EffectMinute, names, [ALL]))
        order: Any = EffectMinute.minute.desc() if group == "minute" else means[0].desc()
        with self.session() as session:
            rows = session.execute(query.group_by(*columns).order_by(order).limit(limit)).all()
        return [_total(names, tuple(row)) for row in rows]


def _refusal(error: Exception) -> EffectsUnavailable:
    if isinstance(error, DataError | IntegrityError):
        return RowRefused(f"the database of effects refuses a row: {error.orig}"[:400])
    return EffectsUnavailable(f"the database of effects cannot be used: {error}"[:400])


def _unrecorded(connection: Connection) -> str | None:
    tables = inspect(connection).get_table_names()
    return FIRST_REVISION if EffectMinute.__tablename__ in tables and "alembic_version" not in tables else None


def _row(key: Key, found: Sequence[Sample]) -> EffectMinute:
    minute, artifact, op, preset, tenant, rollout, arm = key
    kl = np.array([sample.kl for sample in found])
    return EffectMinute(
        minute=minute, artifact=artifact, op=op, preset=preset, tenant=tenant, rollout=rollout, arm=arm,
        completions=len(found),
        tokens=sum(sample.tokens for sample in found), kl_mean=float(kl.mean()), kl_p50=float(np.quantile(kl, 0.5)),
        kl_p95=float(np.quantile(kl, 0.95)), entropy_change=float(np.mean([s.entropy_change for s in found])),
        top1_changed=float(np.mean([s.top1_changed for s in found])),
        repetition=float(np.mean([s.repetition for s in found])), length=float(np.mean([s.length for s in found])),
        base_ended=float(np.mean([s.base_ended for s in found])))


def _total(names: tuple[str, ...], row: tuple[Any, ...]) -> Total:
    known = dict(zip(names, row, strict=False))
    first, last, completions, tokens, *numbers = row[len(names):]
    return Total(artifact=known.get("artifact"), op=known.get("op"), preset=known.get("preset"),
                 minute=known.get("minute"), tenant=known.get("tenant"), rollout=known.get("rollout"),
                 arm=known.get("arm"), completions=completions, tokens=tokens,
                 first=first * MINUTE_S, last=last * MINUTE_S,
                 **dict(zip(MEANS, numbers, strict=True)))
