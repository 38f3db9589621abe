"""What graded answers were, in the database of measured effects, counted by minute, artifact, preset, grader and
outcome.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Integer, String, func, select
from sqlalchemy.orm import Mapped, mapped_column

from server.effects.report import ALL, UNTOUCHED
from server.effects.store import GROUPS, MINUTE_S, Base, EffectStore, shown


class OutcomeMinute(Base):
    """Graded answers of one minute, by what a grader said they are."""

    __tablename__ = "outcome_minutes"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    minute: Mapped[int] = mapped_column(Integer, index=True)
    artifact: Mapped[str] = mapped_column(String(128), index=True)
    preset: Mapped[str] = mapped_column(String(128), index=True)
    grader: Mapped[str] = mapped_column(String(64))
    outcome: Mapped[str] = mapped_column(String(64))
    answers: Mapped[int] = mapped_column(Integer)


@dataclass(frozen=True)
class OutcomeCount:
    """How many answers of a minute were one thing. artifact: "all" for whole specs, "untouched" for no steering."""

    minute: int
    artifact: str
    preset: str
    grader: str
    outcome: str
    answers: int


@dataclass(frozen=True)
class OutcomeTotal:
    """What the answers of a group were by one grader. answers: how many were graded."""

    artifact: str | None
    preset: str | None
    minute: int | None
    grader: str
    answers: int
    shares: dict[str, float]


def write(store: EffectStore, counts: Sequence[OutcomeCount]) -> None:
    """Add the counts. Raises EffectsUnavailable, and writes nothing, if one cannot be."""
    with store.session() as session:
        session.add_all(OutcomeMinute(**asdict(count)) for count in counts)


def totals(store: EffectStore, *, group: str, since: int | None = None, until: int | None = None,
           artifact: str | None = None, preset: str | None = None, limit: int = 1000) -> list[OutcomeTotal]:
    """What graded answers were, by group and grader, most answers first (by minute: newest first). No row counts an
    answer twice. The arguments are those of `EffectStore.totals`.

    Raises:
        EffectsUnavailable.
    """
    names = tuple(name for name in GROUPS[group] if name != "op")
    columns: list[Any] = [getattr(OutcomeMinute, name) for name in (*names, "grader", "outcome")]
    query = select(*columns, func.sum(OutcomeMinute.answers))
    if since is not None:
        query = query.where(OutcomeMinute.minute >= since // MINUTE_S)
    if until is not None:
        query = query.where(OutcomeMinute.minute < -(-until // MINUTE_S))
    if artifact is not None:
        query = query.where(OutcomeMinute.artifact == artifact)
    elif "artifact" not in names:
        # A steered answer is counted for the whole spec and for each artifact. Only the first counts here.
        query = query.where(OutcomeMinute.artifact.in_((ALL, UNTOUCHED)))
    if preset is not None:
        query = query.where(OutcomeMinute.preset == preset)
    query = query.where(*shown(OutcomeMinute))
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
                        grader=key[-1], answers=answers,
                        shares={outcome: count / answers for outcome, count in sorted(counts.items())})
