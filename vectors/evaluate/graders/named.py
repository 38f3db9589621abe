"""Graders by their name: `refusal`, `language=fr`, or a grader with all its options as an object."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from steering.language.errors import InvalidRequest, InvalidSpec
from vectors.evaluate.graders.any import AnyGrader
from vectors.evaluate.graders.contract import Grader
from vectors.evaluate.graders.llm_judge import LlmJudge
from vectors.evaluate.graders.probe import ProbeGrader

_ANY: TypeAdapter[AnyGrader] = TypeAdapter(AnyGrader)
# The option that may stand behind the name.
MAIN = {"language": "language", "regex": "pattern", "sentiment": "wanted", "refusal": "wanted"}


def spelled(text: str) -> dict[str, Any]:
    """The object that a grader of one word, or of a word and its main option, is short for.

    Raises:
        InvalidRequest: the grader has no main option.
    """
    kind, _, value = text.partition("=")
    if value and kind not in MAIN:
        raise InvalidRequest(f"the grader {kind!r} has no main option",
                             fix=f"Give it as JSON, or use one of {', '.join(MAIN)}.")
    return {"kind": kind, MAIN[kind]: value} if value else {"kind": kind}


def grader_of(given: str | Mapping[str, Any]) -> Grader:
    """The grader that is meant.

    Raises:
        InvalidRequest: there is none of that name, or its options are wrong; the path is that of the option.
    """
    asked = spelled(given) if isinstance(given, str) else dict(given)
    try:
        return _ANY.validate_python(asked)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        # A place begins with the kind, by which pydantic tells the graders apart.
        raise InvalidRequest(str(first["msg"]).removeprefix("Value error, "), param=tuple(first["loc"][1:]),
                             fix="docs/graders.md lists graders and their options.") from error


def text_graders(asked: Sequence[str | Mapping[str, Any]]) -> tuple[Grader, ...]:
    """Graders that need nothing but the text of an answer, as requests and production have it.

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


def name_of(grader: Grader) -> str:
    """A short name for tables and metrics: the kind, with the main option where it has one."""
    asked = grader.model_dump(mode="json", exclude_defaults=True)
    kind = str(grader.model_dump()["kind"])
    value = asked.get(MAIN.get(kind, ""))
    return kind if value is None else f"{kind}={value}"[:64]
