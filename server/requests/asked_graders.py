"""The graders that a request or a setting asks for: those that need nothing but the text of an answer."""

from collections.abc import Sequence

from steering.language.errors import InvalidRequest, InvalidSpec
from steering.language.spec import AskedGrader
from vectors.evaluate.graders.contract import Grader
from vectors.evaluate.graders.llm_judge import LlmJudge
from vectors.evaluate.graders.named import grader_of
from vectors.evaluate.graders.probe import ProbeGrader


def text_graders(asked: Sequence[AskedGrader]) -> tuple[Grader, ...]:
    """
    Raises:
        InvalidSpec: one is not known or takes more than text; the path begins with its number.
    """
    found = []
    for n, one in enumerate(asked):
        try:
            grader = grader_of(one)
        except InvalidRequest as error:
            raise InvalidSpec(error.message, param=(n, *error.path), fix=error.fix) from error
        if isinstance(grader, LlmJudge | ProbeGrader):
            raise InvalidSpec("answers are graded by their text alone here, without another model or a probe",
                              param=(n,), fix="Use /v1/evaluations, or `monitor` for a probe.")
        found.append(grader)
    return tuple(found)
