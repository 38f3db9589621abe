"""Whether an answer is whole: the grader that asks for nothing else."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from vectors.evaluate.graders.contract import Answer, Grader, Tools, Verdict


class WholeGrader(Grader):
    """`whole`, or `broken` as every grader has it; see `wholeness`."""

    kind: Literal["whole"] = "whole"
    outcomes: ClassVar[tuple[str, ...]] = ("whole",)

    def judge(self, answers: Sequence[Answer], tools: Tools) -> list[Verdict]:
        return [Verdict("whole", True) for _ in answers]
