"""Graders by their name: `refusal`, `language=fr`, or a grader with all its options as an object."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from steering.language.errors import InvalidRequest
from vectors.evaluate.graders.any import AnyGrader
from vectors.evaluate.graders.contract import Grader

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


def name_of(grader: Grader) -> str:
    """A short name for tables and metrics: the kind, with the main option where it has one."""
    asked = grader.model_dump(mode="json", exclude_defaults=True)
    kind = str(grader.model_dump()["kind"])
    value = asked.get(MAIN.get(kind, ""))
    return kind if value is None else f"{kind}={value}"[:64]
