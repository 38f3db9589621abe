"""An answer that must be a certain one: exactly, or the first of several that it names."""

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from vectors.evaluate.graders.contract import Answer, Grader, Tools, Verdict
from vectors.evaluate.graders.refusals import GraderUnusable
from vectors.evaluate.graders.words import plain

Text = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class ChoiceGrader(Grader):
    """`right` if the answer is one of those expected, which the prompts bring along (`Answer.expected`) or `correct`
    lists; `other` if it names none of the options.

    exact: the whole text, without case, outer punctuation and runs of spaces. first: the option that the text names
    first, as whole words; a letter counts where it is marked as an option, as in "B", "(b)", "B." or "the answer is B".
    """

    kind: Literal["choice"] = "choice"
    match: Literal["exact", "first"] = Field(default="exact", description="How an answer is read.")
    correct: Annotated[list[Text], Field(max_length=256)] = Field(default=[], description="Right for every prompt.")
    options: Annotated[list[Text], Field(max_length=256)] = Field(
        default=[], description="All that may be chosen, for `first`; those that are expected are always among them.")
    outcomes: ClassVar[tuple[str, ...]] = ("right", "wrong", "other")
    prose: ClassVar[bool] = False

    def judge(self, answers: Sequence[Answer], tools: Tools) -> list[Verdict]:
        return [self._one(answer, n) for n, answer in enumerate(answers)]

    def _one(self, answer: Answer, number: int) -> Verdict:
        expected = [_bare(text) for text in (answer.expected or self.correct)]
        if not expected:
            raise GraderUnusable(f"nothing says what the right answer to prompt {number} is",
                                 param=("grader", "correct"),
                                 fix="Give `expected` with each prompt, or `correct` for all.")
        if self.match == "exact":
            said = _bare(answer.text)
            return Verdict("right", True) if said in expected else Verdict("wrong", False, (f"says {said[:80]!r}",))
        known = dict.fromkeys([*expected, *map(_bare, self.options)])
        named = _first_named(answer.text, list(known))
        if named is None:
            return Verdict("other", False, ("names none of the options",))
        return Verdict("right" if named in expected else "wrong", named in expected, (f"names {named!r}",))


def _bare(text: str) -> str:
    return plain(text).strip(" .,:;!?\"'()[]*`")


def _first_named(text: str, options: Sequence[str]) -> str | None:
    """Of options that begin at the same place the longest."""
    flat = " ".join(text.split())
    hits = [(found.start(), -len(option), option) for option in options
            if (found := re.search(_pattern(option), flat, re.IGNORECASE))]
    return min(hits)[2] if hits else None


def _pattern(option: str) -> str:
    if len(option) == 1 and option.isalpha():
        # "A" is a word and "I" another: a letter is an option where it is marked as one, or is all there is.
        return (rf"\({option}\)|(?<!\w){option}(?=[).:]|$)|\b(?:answer|option|choice)(?: is|:)? \(?{option}(?!\w)")
    return rf"(?<!\w){re.escape(option)}(?!\w)"
