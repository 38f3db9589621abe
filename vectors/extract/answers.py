"""Whole answers under what a method made, judged by a grader, beside those under random vectors of equal length.

The searches of these methods go by first tokens, which are cheap and may mislead, because a text that begins as wanted
may break behind its first word. Where a request names a grader, the answers themselves decide whether what was made is
a draft.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from pydantic import Field

from steering.language.scope import Scope
from steering.programs.program import Program
from vectors.evaluate.graders.any import AnyGrader
from vectors.evaluate.graders.contract import BROKEN, Answer, Grader, Tools
from vectors.evaluate.graders.grade import grade
from vectors.extract.programs import EVERYWHERE, program_of
from vectors.extract.recipe import Made, RecipeOptions
from vectors.extract.standing import random_like, rounded, standing
from vectors.extract.subject import Subject
from vectors.extract.trial.plan import Question
from vectors.extract.work import Span

# Questions, tokens of an answer, random vectors, and texts that the card keeps.
MOST_QUESTIONS, TOKENS, DRAWS, KEPT = 12, 24, 10, 3
Step = Callable[[float], None]


class AnsweredOptions(RecipeOptions):
    """What methods take whose data are prompts."""

    grader: AnyGrader | None = Field(
        default=None, description="What a whole answer to a held-out prompt must be. Answers are then written under "
        "what was made and under random vectors of equal length, and these decide whether it is a draft. Without it "
        "first tokens decide.")


def tokens_of(questions: Sequence[Question]) -> int:
    """Tokens that judging them puts through the model: each answer is written, and then read untouched."""
    return (2 + DRAWS) * sum(2 * len(one.tokens) + 2 * TOKENS for one in questions)


def judged(made: Made, scope: Scope | None, grader: Grader, questions: Sequence[Question], subject: Subject,
           generator: torch.Generator, span: Span) -> dict[str, Any]:
    """What the card tells of whole answers. `random` has the percentile of the successes among random vectors.

    Raises:
        ExtractionCancelled. TrimtabError: the grader fails.
    """
    layers = made.default_layers if made.default_layers is not None else list(made.numbers)

    def program(turned: Callable[[torch.Tensor], torch.Tensor]) -> Program:
        numbers = {layer: {"vector": turned(made.numbers[layer]["vector"])} for layer in layers}
        return program_of(subject.facts, made.kind, made.op, made.site, numbers, scope=scope or EVERYWHERE,
                          options=made.options, strength=made.strength.value)

    judge = _Judge(grader, questions, subject)
    untouched = judge.arm(None, span.part(0, DRAWS + 2))
    steered = judge.arm(program(lambda vector: vector), span.part(1, DRAWS + 2))
    random = [judge.arm(program(lambda vector: random_like(vector, generator)), span.part(n + 2, DRAWS + 2))
              for n in range(DRAWS)]
    return {"grader": grader.model_dump(mode="json", exclude_defaults=True) | {"kind": grader.model_dump()["kind"]},
            "questions": len(questions), "tokens": TOKENS, "untouched": untouched, "steered": steered,
            "random": standing(steered["success"], [arm["success"] for arm in random]),
            "random_broken": rounded(sum(arm["broken"] for arm in random) / len(random))}


def refused_as(answers: Mapping[str, Any], least: float) -> str | None:
    """Why an artifact with such answers is a draft."""
    percentile = answers["random"]["percentile"]
    if percentile >= least:
        return None
    return (f"{answers['steered']['success']:.0%} of its whole answers are a success, which is more than "
            f"{percentile:.0f} % of random vectors of equal length reach, and {least:.0f} % are needed to tell it from "
            "luck")


class _Judge:
    def __init__(self, grader: Grader, questions: Sequence[Question], subject: Subject) -> None:
        self._grader, self._questions, self._subject = grader, questions, subject
        # What is usual is what the untouched model has, whose arm comes first.
        self._usual: float | None = None

    def arm(self, program: Program | None, step: Step) -> dict[str, Any]:
        step(0.0)
        asked = self._questions
        written = self._subject.write([one.tokens for one in asked], TOKENS, program)
        step(0.6)
        some = [n for n, one in enumerate(written) if one.ids]
        known = self._subject.continuation_logprobs([(*asked[n].tokens, *written[n].ids) for n in some],
                                                    [len(asked[n].tokens) for n in some])
        surprises = dict(zip(some, (-value for value in known), strict=True))
        if self._usual is None:
            self._usual = median(surprises.values()) if surprises else 0.0
        tools = Tools(usual_surprise=self._usual, surprise=lambda answers: [surprises.get(n, 0.0)
                                                                           for n in range(len(answers))])
        verdicts = grade(self._grader, [Answer(text.text, one.text, text.ended, one.expected)
                                        for text, one in zip(written, asked, strict=True)], tools)
        outcomes = [verdict.outcome for verdict in verdicts]
        return {"success": rounded(sum(verdict.success for verdict in verdicts) / len(verdicts)),
                "broken": rounded(outcomes.count(BROKEN) / len(outcomes)),
                "outcomes": {name: outcomes.count(name) for name in dict.fromkeys(outcomes)},
                "samples": [{"prompt": one.text[-300:], "text": text.text, "outcome": outcome} for one, text, outcome in
                            zip(asked[:KEPT], written, outcomes, strict=False)]}
