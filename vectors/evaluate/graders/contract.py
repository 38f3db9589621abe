"""What a grader is: from answers to verdicts, each with its reasons.

A grader looks at whole texts. One that is broken (word salad, a loop, two languages in a sentence, nothing) has the
outcome `broken` whatever else may be said of it, and never counts as a success: every grader asks `wholeness` first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from steering.language.fields import Model

BROKEN = "broken"


@dataclass(frozen=True)
class Answer:
    """text: what the model wrote, without special tokens. prompt: what it answers, where a grader looks at that.
    ended: by the model itself, not by a limit on its length. expected: right answers to this prompt, if there are such.
    """

    text: str
    prompt: str = ""
    ended: bool = True
    expected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """outcome: one of the grader's, or `broken`. success: it is the wanted one. reasons: short, for people."""

    outcome: str
    success: bool
    reasons: tuple[str, ...] = ()


# One number for each answer.
Measure = Callable[[Sequence[Answer]], Sequence[float]]


@dataclass(frozen=True)
class Tools:
    """What graders cannot know from text alone; the caller has the model.

    surprise: mean -log p of an answer's tokens behind its prompt under the untouched model, nats. usual_surprise: what
    the untouched model's own answers have, drawn at the same temperature (their median). probes: name -> scores of a
    stored probe, see `vectors.evaluate.reads`.
    """

    surprise: Measure | None = None
    usual_surprise: float = 0.0
    probes: dict[str, Measure] = field(default_factory=dict)


class Grader(Model, ABC):
    """A grader and its options. `kind` names it in requests and reports."""

    # Every outcome besides `broken`.
    outcomes: ClassVar[tuple[str, ...]]
    # Answers are sentences; otherwise only emptiness, loops and surprise make them broken.
    prose: ClassVar[bool] = True
    # Outcomes that receipts and metrics call otherwise than reports of evaluations do.
    said: ClassVar[dict[str, str]] = {}

    @classmethod
    def told(cls, outcome: str) -> str:
        """The outcome as receipts and metrics call it."""
        return cls.said.get(outcome, outcome)

    @abstractmethod
    def judge(self, answers: Sequence[Answer], tools: Tools) -> list[Verdict]:
        """Verdicts on answers that are whole."""
        ...
