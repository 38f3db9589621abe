"""Whole answers under what a method made, judged by a grader, beside those under random artifacts of equal size.

The searches of these methods go by first tokens, which are cheap and may mislead, because a text that begins as wanted
may break behind its first word. Where a request names a grader, the answers themselves decide whether what was made is
a draft.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Annotated, Any

from pydantic import Field

from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import InvalidRequest
from steering.language.intervention import Intervention
from steering.language.scope import Scope
from steering.programs.compiler import compile_program
from steering.programs.program import Program
from vectors.evaluate.graders.any import AnyGrader
from vectors.evaluate.graders.contract import BROKEN, Answer, Grader, Tools
from vectors.evaluate.graders.grade import grade
from vectors.extract.asked import Question as Asked
from vectors.extract.contrasts import text_of
from vectors.extract.programs import EVERYWHERE
from vectors.extract.recipe import Made, Recipe, RecipeOptions
from vectors.extract.standing import rounded, standing
from vectors.extract.subject import Prompt, Subject, encoded
from vectors.extract.trial.plan import Question
from vectors.extract.work import Span
from vectors.placebo import drawn_like

# Questions, tokens of an answer, random artifacts, and texts that the card keeps.
MOST_QUESTIONS, TOKENS, DRAWS, KEPT = 12, 24, 10, 3
Step = Callable[[float], None]


class AnsweredOptions(RecipeOptions):
    """What methods take whose artifact changes what the model answers, and which choose it by something cheaper."""

    grader: AnyGrader | None = Field(
        default=None, description="What a whole answer must be. Answers are then written under what was made and under "
        "random artifacts of equal size, and these decide whether it is a draft. Without it the method's own measure "
        "decides.")
    questions: Annotated[list[Asked | Prompt], Field(max_length=MOST_QUESTIONS)] = Field(
        default=[], description="What is asked for these answers: text, conversations, token ids, or any of them with "
        "right answers. By default held-out prompts of the data, where the data are prompts that the model answers.")


def questions_of(recipe: Recipe, request: RecipeOptions, data: Any, subject: Subject) -> Sequence[Question]:
    """What is answered where a grader is named; nothing where none is.

    Raises:
        InvalidData: a question is empty or too long. InvalidRequest: there is none.
    """
    if not isinstance(request, AnsweredOptions) or request.grader is None:
        return ()
    given = [one if isinstance(one, Asked) else Asked.model_construct(prompt=one, expected=[])
             for one in request.questions]
    found = [Question(encoded(subject, one.prompt, ("questions", n)), text_of(one.prompt) or "", tuple(one.expected))
             for n, one in enumerate(given)] or recipe.questions(request, data)
    if not found:
        raise InvalidRequest("nothing is asked whose answers could be graded", param="questions",
                             fix="Give prompts to answer: the data of this method are none.")
    return found


def tokens_of(questions: Sequence[Question]) -> int:
    """Tokens that judging them puts through the model: each answer is written, and then read untouched."""
    return (2 + DRAWS) * sum(2 * len(one.tokens) + 2 * TOKENS for one in questions)


def judged(made: Made, scope: Scope | None, grader: Grader, questions: Sequence[Question], subject: Subject,
           seed: int, span: Span) -> dict[str, Any]:
    """What the card tells of whole answers. `random` has the percentile of the successes among random artifacts.

    Raises:
        ExtractionCancelled. TrimtabError: the grader fails.
    """
    layers = made.default_layers if made.default_layers is not None else list(made.numbers)
    payload = Payload.build(made.kind, {layer: {name: tensor.float() if tensor.is_floating_point() else tensor
                                                for name, tensor in made.numbers[layer].items()} for layer in layers})

    def program(numbers: Payload) -> Program:
        source = Source(ref="made", digest="", payload=numbers, op=made.op, site=made.site, strength=made.strength,
                        options=made.options or {}, residual_norm=made.residual_norm or {}, sigma=made.sigma or {})
        return compile_program([Resolved(Intervention(artifact="made", scope=scope or EVERYWHERE), source)],
                               subject.facts)

    judge = _Judge(grader, questions, subject)
    untouched = judge.arm(None, span.part(0, DRAWS + 2))
    steered = judge.arm(program(payload), span.part(1, DRAWS + 2))
    random = [judge.arm(program(drawn_like(payload, subject.facts, made.site, seed + n)), span.part(n + 2, DRAWS + 2))
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
            f"{percentile:.0f} % of random ones of equal size reach, and {least:.0f} % are needed to tell it from luck")


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
