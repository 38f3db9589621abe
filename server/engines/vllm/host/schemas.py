"""JSON schemas that answers must follow: refused before a request runs where the grammar compiler refuses them, or
would leave a constraint out without a word."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from steering.language.errors import InvalidRequest

PARAM = "response_format.json_schema.schema"
# Constraints that xgrammar reads past: an answer might break them.
LEFT_OUT = ("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "multipleOf",
            "contains", "minContains", "maxContains", "$dynamicRef", "$recursiveRef")
# These are all that is read of a schema that has one of them; `type` beside them is implied by their branches.
EXCLUSIVE = ("$ref", "anyOf", "oneOf", "allOf")
CONSTRAINTS = frozenset((
    "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
    "maxProperties", "items", "prefixItems", "minItems", "maxItems", "uniqueItems", "minLength", "maxLength", "pattern",
    "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const", *EXCLUSIVE))
ONE_SCHEMA = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
MAPS = ("properties", "patternProperties", "$defs", "definitions")
MAX_SCHEMAS = 4096
_LOOK_AROUND = re.compile(r"\(\?<?[=!]")
_WHERE_IN_XGRAMMAR = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+: ")


def check_schema(schema: Mapping[str, Any]) -> None:
    """Takes milliseconds, and seconds for schemas of many kilobytes: to be called in a thread.

    Raises:
        InvalidRequest: saying what of the schema cannot be held to.
    """
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams, check_json_nesting
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    try:
        check_json_nesting(dict(schema))
        for path, part in _schemas(schema):
            _check_part(path, part)
        validate_xgrammar_grammar(SamplingParams(structured_outputs=StructuredOutputsParams(json=dict(schema))))
    except (VLLMClientError, ValueError) as error:
        said = str(error.__cause__ or error).strip()
        raise refused(_WHERE_IN_XGRAMMAR.sub("", said).splitlines()[0]) from error


def refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"answers cannot be held to this schema: {reason}", param=PARAM,
                          fix="Leave that out of the schema, and check the answer for it.")


def _check_part(path: str, part: Mapping[str, Any]) -> None:
    for name in LEFT_OUT:
        if name in part:
            raise refused(f"{name} is not supported (at {path})")
    own = next((name for name in EXCLUSIVE if name in part), None)
    if own is not None:
        beside = sorted(CONSTRAINTS & part.keys() - {own})
        if beside:
            raise refused(f"{beside[0]} beside {own} is not supported (at {path})")
    ref = part.get("$ref")
    if isinstance(ref, str) and ref != "#" and not ref.startswith("#/"):
        raise refused(f"$ref must point into the schema itself, as in #/$defs/name (at {path})")
    patterns = [part.get("pattern"), *(part.get("patternProperties") or ())]
    if any(isinstance(pattern, str) and _LOOK_AROUND.search(pattern) for pattern in patterns):
        raise refused(f"patterns that look ahead or behind are not supported (at {path})")


def _schemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema in a schema, with its path. Names of properties are no keywords and are passed over.

    Raises:
        InvalidRequest: there are more than `MAX_SCHEMAS`.
    """
    waiting: list[tuple[str, Any]] = [("the top", schema)]
    count = 0
    while waiting:
        path, part = waiting.pop()
        if not isinstance(part, dict):
            continue
        count += 1
        if count > MAX_SCHEMAS:
            raise refused(f"it holds more than {MAX_SCHEMAS} schemas")
        yield path, part
        here = "" if path == "the top" else f"{path}."
        waiting += [(f"{here}{name}", part[name]) for name in ONE_SCHEMA if name in part]
        for name in LISTS:
            if isinstance(part.get(name), list):
                waiting += [(f"{here}{name}[{i}]", one) for i, one in enumerate(part[name])]
        for name in MAPS:
            if isinstance(part.get(name), dict):
                waiting += [(f"{here}{name}.{key}", one) for key, one in part[name].items()]
