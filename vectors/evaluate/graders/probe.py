"""A trained probe as a grader: what the untouched model makes of the answer, read at one layer."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from steering.language.fields import LONGEST_NAME, NAME_PATTERN
from vectors.evaluate.graders.contract import Answer, Grader, Tools, Verdict
from vectors.evaluate.graders.refusals import GraderUnusable


class ProbeGrader(Grader):
    """`above` or `below` a threshold of the probe's score of the answer."""

    kind: Literal["probe"] = "probe"
    probe: str = Field(pattern=NAME_PATTERN, max_length=LONGEST_NAME,
                       description="Artifact of the library that can be read.")
    threshold: float = Field(description="The score that parts the two.")
    wanted: Literal["above", "below"] = Field(default="above", description="The outcome that is a success.")
    outcomes: ClassVar[tuple[str, ...]] = ("above", "below")

    def judge(self, answers: Sequence[Answer], tools: Tools) -> list[Verdict]:
        if self.probe not in tools.probes:
            raise GraderUnusable(f"the probe {self.probe} is not loaded", param=("grader", "probe"),
                                 fix="Name a probe of the library that was made on the served model.")
        return [self._one(score) for score in tools.probes[self.probe](answers)]

    def _one(self, score: float) -> Verdict:
        outcome = "above" if score > self.threshold else "below"
        return Verdict(outcome, outcome == self.wanted, (f"score {score:.3f}",))
