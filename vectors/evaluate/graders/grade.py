"""Grading: wholeness first, then what the grader is for."""

from collections.abc import Sequence

from vectors.evaluate.graders.contract import BROKEN, Answer, Grader, Tools, Verdict
from vectors.evaluate.graders.wholeness import faults


def grade(grader: Grader, answers: Sequence[Answer], tools: Tools | None = None) -> list[Verdict]:
    """A verdict for each answer, in order.

    Raises:
        GraderUnusable: it needs a tool that is not there. JudgeFailed: see `LlmJudge`.
    """
    tools = tools or Tools()
    found = faults(answers, tools, prose=grader.prose)
    verdicts = [Verdict(BROKEN, False, tuple(reasons)) for reasons in found]
    whole = [n for n, reasons in enumerate(found) if not reasons]
    judged = grader.judge([answers[n] for n in whole], tools) if whole else []
    for n, verdict in zip(whole, judged, strict=True):
        verdicts[n] = verdict
    return verdicts
