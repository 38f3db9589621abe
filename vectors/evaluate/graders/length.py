"""The length of an answer, in words or sentences."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from vectors.evaluate.graders.contract import Answer, Grader, Tools, Verdict
from vectors.evaluate.graders.words import sentences, words


class LengthGrader(Grader):
    """`within` the bounds, `shorter` or `longer`. An answer that was stopped by a limit on its tokens before it went
    over the upper bound is `cut`: nobody knows how long it would have been.
    """

    kind: Literal["length"] = "length"
    unit: Literal["words", "sentences"] = Field(default="words", description="What is counted.")
    least: int = Field(default=0, ge=0, description="Fewest that are a success.")
    most: int | None = Field(default=None, ge=0, description="Most that are a success; by default any number.")
    outcomes: ClassVar[tuple[str, ...]] = ("within", "shorter", "longer", "cut")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most {self.most} is below least {self.least}")
        if self.most is None and self.least == 0:
            raise ValueError("give least, most or both")
        return self

    def judge(self, answers: Sequence[Answer], tools: Tools) -> list[Verdict]:
        return [self._one(answer) for answer in answers]

    def _one(self, answer: Answer) -> Verdict:
        count = len(words(answer.text) if self.unit == "words" else sentences(answer.text))
        if self.most is not None and count > self.most:
            outcome = "longer"
        elif self.most is not None and not answer.ended:
            outcome = "cut"
        else:
            outcome = "shorter" if count < self.least else "within"
        return Verdict(outcome, outcome == "within", (f"{count} {self.unit}",))
