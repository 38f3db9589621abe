"""What whole answers are, by graders, as the receipt of a request tells it (`"report": "outcome"`)."""

from collections import Counter
from collections.abc import Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import structlog
from pydantic import BaseModel, Field

from server.effects.report import InArm
from vectors.evaluate.graders.contract import Answer, Grader, Tools, Verdict
from vectors.evaluate.graders.grade import grade
from vectors.evaluate.graders.named import name_of

log = structlog.get_logger("trimtab.outcomes")
# Longer answers are graded by their beginning, because what a grading costs must be known beforehand.
MOST_CHARACTERS = 20_000


@dataclass(frozen=True)
class Ended:
    """An answer that is whole.

    excess: how much less likely the untouched model finds it than what it writes itself, nats a token; None where that
    was not measured. artifacts: those that acted. preset: as metrics name it. arms: of roll-outs, that it belongs to.
    """

    index: int
    answer: Answer
    artifacts: tuple[str, ...] = ()
    preset: str = ""
    excess: float | None = None
    arms: Sequence[InArm] = ()
    # Of the request: what is logged, traced and stored of its grading belongs to it.
    context: Context = field(default_factory=copy_context, compare=False, repr=False)


class ChoiceOutcome(BaseModel):
    """What one choice is."""

    index: int
    outcome: str
    success: bool = Field(description="The outcome is the one that the grader wants; a broken answer never is.")
    reasons: list[str]


class GraderOutcome(BaseModel):
    """What one grader says of the choices."""

    grader: str
    shares: dict[str, float] = Field(description="Of the graded choices, by outcome; `broken` is one of them.")
    choices: list[ChoiceOutcome]


class Outcomes(BaseModel):
    """What the answers were. Choices that only call tools are no text and are left out."""

    status: Literal["graded", "failed"]
    reason: str | None = None
    surprise: bool = Field(default=False, description="Whether it was known how likely the untouched model finds the "
                           "texts. Without that about half of the broken ones are found.")
    graders: list[GraderOutcome] = []


def outcomes_of(ended: Sequence[Ended], graders: Sequence[Grader]) -> Outcomes:
    """Grade the choices of a request. Blocks. A grader that fails makes the whole report a failed one, because shares
    of a part would mislead."""
    try:
        found = [(grader, verdicts_on(grader, ended)) for grader in graders]
    except Exception as error:  # the answer is there, and its report must not take it away
        log.warning("grading_failed", error=f"{type(error).__name__}: {error}"[:300])
        return Outcomes(status="failed", reason="the grading failed; the server's log says why", graders=[])
    return Outcomes(status="graded", surprise=bool(ended) and all(one.excess is not None for one in ended), graders=[
        GraderOutcome(grader=name_of(grader), shares=_shares(grader, verdicts), choices=[
            ChoiceOutcome(index=one.index, outcome=grader.told(verdict.outcome), success=verdict.success,
                          reasons=list(verdict.reasons)) for one, verdict in zip(ended, verdicts, strict=True)])
        for grader, verdicts in found])


def verdicts_on(grader: Grader, ended: Sequence[Ended]) -> list[Verdict]:
    """A verdict on each answer. Blocks."""
    verdicts = []
    for one in ended:
        # The excess is over what is usual for the model at the same places, so what is usual is 0.
        tools = Tools() if one.excess is None else Tools(surprise=partial(_each, one.excess))
        shown = replace(one.answer, text=one.answer.text[:MOST_CHARACTERS])
        verdicts += grade(grader, [shown], tools)
    return verdicts


def _each(excess: float, answers: Sequence[Answer]) -> list[float]:
    return [excess] * len(answers)


def _shares(grader: Grader, verdicts: Sequence[Verdict]) -> dict[str, float]:
    counts = Counter(verdict.outcome for verdict in verdicts)
    names = dict.fromkeys((*grader.outcomes, *counts, "broken"))
    return {grader.told(name): counts[name] / len(verdicts) for name in names} if verdicts else {}
