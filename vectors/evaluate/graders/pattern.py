"""A regular expression that an answer must match, or must not."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import regex
from pydantic import Field, field_validator

from vectors.evaluate.graders.contract import Answer, Grader, Tools, Verdict
from vectors.evaluate.graders.refusals import GraderUnusable

# Patterns come from users. One that backtracks without end is stopped.
TIMEOUT_S = 1.0


class RegexGrader(Grader):
    """`match` if the pattern is found anywhere in the answer; `^` and `$` are the ends of the text."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1, max_length=4096, description="In the syntax of Python's re.")
    ignore_case: bool = Field(default=False, description="Whether case does not matter.")
    wanted: Literal["match", "no_match"] = Field(default="match", description="The outcome that is a success.")
    outcomes: ClassVar[tuple[str, ...]] = ("match", "no_match")
    prose: ClassVar[bool] = False

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            regex.compile(value)
        except regex.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value

    def judge(self, answers: Sequence[Answer], tools: Tools) -> list[Verdict]:
        compiled = regex.compile(self.pattern, regex.IGNORECASE if self.ignore_case else 0)
        return [self._one(compiled, answer.text) for answer in answers]

    def _one(self, compiled: "regex.Pattern[str]", text: str) -> Verdict:
        try:
            found = compiled.search(text, timeout=TIMEOUT_S)
        except TimeoutError as error:
            raise GraderUnusable(f"the pattern takes more than {TIMEOUT_S:g} s on one answer",
                                 param=("grader", "pattern"), fix="Write it without nested repetitions.") from error
        outcome = "no_match" if found is None else "match"
        return Verdict(outcome, outcome == self.wanted, () if found is None else (f"found {found.group()[:80]!r}",))
