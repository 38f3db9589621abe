"""Measured effects in a database: one row per minute, artifact, op and preset.

The rows lie in a database of their own: it is written in the background, may be lost without harm, and a lock on it
must not touch the library.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from sqlalchemy import ColumnElement, Connection, Float, Integer, String, func, inspect, or_, select
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from server.effects.report import ALL
from steering.language.errors import TrimtabError
from steering.language.finite import not_finite
from vectors.library.beside import Beside, metadata
from vectors.library.spaces import HOUSE, READER

log = structlog.get_logger("trimtab.effects")
MINUTE_S = 60
MIGRATIONS = Path(__file__).parent / "migrations"
# Of a database from before there were migrations, which holds the tables of the first one.
FIRST_REVISION = "0001"


class EffectsUnavailable(TrimtabError):
    """The database of measured effects cannot be used. Requests do not need it."""

    code = "effects_unavailable"


class RowRefused(EffectsUnavailable):
    """The database works, and does not take a row."""


class Base(DeclarativeBase):
    metadata = metadata()


class EffectMinute(Base):
    """Completions of one minute: means over them of the means over their tokens; p50 and p95 over completions."""

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


@dataclass(frozen=True)
class Sample:
    """One measured completion, for one intervention or (artifact and op "all") the whole spec."""

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
GROUPS = {"artifact": ("artifact", "op"), "preset": ("preset",), "minute": ("minute",),
          "all": ("artifact", "op", "preset")}


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
        groups: dict[tuple[int, str, str, str], list[Sample]] = {}
        refused = 0
        for sample in samples:
            numbers = asdict(sample)
            if None in numbers.values() or any(not_finite(numbers)):
                refused += 1
            else:
                groups.setdefault((sample.minute, sample.artifact, sample.op, sample.preset), []).append(sample)
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

    def totals(self, *, group: str, since: int | None = None, until: int | None = None, artifact: str | None = None,
               preset: str | None = None, limit: int = 1000) -> list[Total]:
        """Effects by group, largest KL first (by minute: newest first). No row counts a completion twice.

        Args:
            group: a key of `GROUPS`.
            since, until: seconds since 1970; minutes that begin in [since, until).

        Raises:
            EffectsUnavailable.
        """
        names = GROUPS[group]
        if artifact is not None and "op" not in names:
            # A completion may use an artifact with more than one op.
            names = (*names, "op")
        columns: list[Any] = [getattr(EffectMinute, name) for name in names]
        weight = EffectMinute.completions
        means: list[Any] = [func.sum(getattr(EffectMinute, name) * weight) / func.sum(weight) for name in MEANS]
        query = select(*columns, func.min(EffectMinute.minute), func.max(EffectMinute.minute), func.sum(weight),
                       func.sum(EffectMinute.tokens), *means)
        if since is not None:
            query = query.where(EffectMinute.minute >= since // MINUTE_S)
        if until is not None:
            query = query.where(EffectMinute.minute < -(-until // MINUTE_S))
        if artifact is not None:
            query = query.where(EffectMinute.artifact == artifact)
        elif "artifact" not in names:
            # A completion has a row for the whole spec and one for each intervention. Only the first is counted.
            query = query.where(EffectMinute.artifact == ALL)
        if preset is not None:
            query = query.where(EffectMinute.preset == preset)
        query = query.where(*shown(EffectMinute))
        order: Any = EffectMinute.minute.desc() if group == "minute" else means[0].desc()
        with self.session() as session:
            rows = session.execute(query.group_by(*columns).order_by(order).limit(limit)).all()
        return [_total(names, tuple(row)) for row in rows]


def shown(table: Any) -> list[ColumnElement[bool]]:
    """What a tenant is told: rows of its own artifacts and presets, which only its requests can use. The house, whose
    names all may use, is told everything."""
    tenant = READER.get().tenant
    if tenant in (None, HOUSE):
        return []
    return [or_(*(column.startswith(f"{tenant}/", autoescape=True) for column in (table.artifact, table.preset)))]


def _refusal(error: Exception) -> EffectsUnavailable:
    if isinstance(error, DataError | IntegrityError):
        return RowRefused(f"the database of effects refuses a row: {error.orig}"[:400])
    return EffectsUnavailable(f"the database of effects cannot be used: {error}"[:400])


def _unrecorded(connection: Connection) -> str | None:
    tables = inspect(connection).get_table_names()
    return FIRST_REVISION if EffectMinute.__tablename__ in tables and "alembic_version" not in tables else None


def _row(key: tuple[int, str, str, str], found: Sequence[Sample]) -> EffectMinute:
    minute, artifact, op, preset = key
    kl = np.array([sample.kl for sample in found])
    return EffectMinute(
        minute=minute, artifact=artifact, op=op, preset=preset, completions=len(found),
        tokens=sum(sample.tokens for sample in found), kl_mean=float(kl.mean()), kl_p50=float(np.quantile(kl, 0.5)),
        kl_p95=float(np.quantile(kl, 0.95)), entropy_change=float(np.mean([s.entropy_change for s in found])),
        top1_changed=float(np.mean([s.top1_changed for s in found])),
        repetition=float(np.mean([s.repetition for s in found])), length=float(np.mean([s.length for s in found])),
        base_ended=float(np.mean([s.base_ended for s in found])))


def _total(names: tuple[str, ...], row: tuple[Any, ...]) -> Total:
    known = dict(zip(names, row, strict=False))
    first, last, completions, tokens, *numbers = row[len(names):]
    return Total(artifact=known.get("artifact"), op=known.get("op"), preset=known.get("preset"),
                 minute=known.get("minute"), completions=completions, tokens=tokens,
                 first=first * MINUTE_S, last=last * MINUTE_S,
                 **dict(zip(MEANS, numbers, strict=True)))
