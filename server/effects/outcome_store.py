"""What graded answers were, in the database of measured effects, counted by minute, artifact, preset, grader, outcome
and tenant, and beside that for each arm of a roll-out that they belong to.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Integer, String, func, select
from sqlalchemy.orm import Mapped, mapped_column

from server.effects.report import ALL, UNTOUCHED
from server.effects.store import ALL_ROWS, GROUPS, Base, EffectStore, Which


class OutcomeMinute(Base):
    """Graded answers of one minute, by what a grader said they are. tenant, rollout, arm: as of measured effects."""

    __tablename__ = "outcome_minutes"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    minute: Mapped[int] = mapped_column(Integer, index=True)
    artifact: Mapped[str] = mapped_column(String(128), index=True)
    preset: Mapped[str] = mapped_column(String(128), index=True)
    grader: Mapped[str] = mapped_column(String(64))
    outcome: Mapped[str] = mapped_column(String(64))
    answers: Mapped[int] = mapped_column(Integer)
    tenant: Mapped[str | None] = mapped_column(String(64), index=True)
    rollout: Mapped[str] = mapped_column(String(32), server_default="", index=True)
    arm: Mapped[str] = mapped_column(String(16), server_default="")


@dataclass(frozen=True)
class OutcomeCount:
    """How many answers of a minute were one thing. artifact: "all" for whole specs, "untouched" for no steering."""

    minute: int
    artifact: str
    preset: str
    grader: str
    outcome: str
    tenant: str
    rollout: str
    arm: str
    answers: int


@dataclass(frozen=True)
class OutcomeTotal:
    """What the answers of a group were by one grader. answers: how many were graded."""

    artifact: str | None
    preset: str | None
    minute: int | None
    tenant: str | None
    rollout: str | None
    arm: str | None
    grader: str
    answers: int
    shares: dict[str, float]


def write(store: EffectStore, counts: Sequence[OutcomeCount]) -> None:
    """Add the counts. Raises EffectsUnavailable, and writes nothing, if one cannot be."""
    with store.session() as session:
        session.add_all(OutcomeMinute(**asdict(count)) for count in counts)


def totals(store: EffectStore, *, group: str, limit: int = 1000, which: Which = ALL_ROWS) -> list[OutcomeTotal]:
    """What graded answers were, by group and grader, most answers first (by minute: newest first). No row counts an
    answer twice. The arguments are those of `EffectStore.totals`.

    Raises:
        EffectsUnavailable.
    """
    names = tuple(name for name in GROUPS[group] if name != "op")
    columns: list[Any] = [getattr(OutcomeMinute, name) for name in (*names, "grader", "outcome")]
    query = select(*columns, func.sum(OutcomeMinute.answers))
    query = query.where(*which.conditions(OutcomeMinute, names, [ALL, UNTOUCHED]))
    with store.session() as session:
        rows = session.execute(query.group_by(*columns)).all()
    found: dict[tuple[Any, ...], dict[str, int]] = {}
    for *key, outcome, answers in rows:
        found.setdefault(tuple(key), {})[outcome] = int(answers)
    totals = [_outcome_total(names, key, counts) for key, counts in found.items()]
    totals.sort(key=lambda total: (-(total.minute or 0), -total.answers, total.artifact or "", total.grader))
    return totals[:limit]


def _outcome_total(names: tuple[str, ...], key: tuple[Any, ...], counts: dict[str, int]) -> OutcomeTotal:
    known, answers = dict(zip(names, key, strict=False)), sum(counts.values())
    return OutcomeTotal(artifact=known.get("artifact"), preset=known.get("preset"), minute=known.get("minute"),
                        tenant=known.get("tenant"), rollout=known.get("rollout"), arm=known.get("arm"),
                        grader=key[-1], answers=answers,
                        shares={outcome: count / answers for outcome, count in sorted(counts.items())})
