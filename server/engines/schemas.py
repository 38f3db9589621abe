"""JSON schemas that answers must follow: refused before a request runs where xgrammar, which both engines hold answers
with, would leave a constraint out without a word."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

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
MAX_SCHEMAS, MAX_DEPTH = 4096, 64
FORMATS = frozenset(("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri",
                     "uri-reference", "uri-template", "json-pointer", "relative-json-pointer"))
LENGTHS = ("minLength", "maxLength")
# Keywords of one schema of which xgrammar keeps the first and leaves the second out.
CLASHES = tuple((one, other) for one in ("pattern", "format") for other in LENGTHS) + (
    ("propertyNames", "patternProperties"), ("propertyNames", "properties"), ("propertyNames", "unevaluatedProperties"),
    ("patternProperties", "properties"))
_LOOK_AROUND = re.compile(r"\(\?<?[=!]")


def check_schema(schema: Any) -> None:
    """
    Raises:
        ValueError: saying what of the schema cannot be held to.
    """
    if _deep(schema):
        raise ValueError(f"it is nested too deeply, at most {MAX_DEPTH} levels of objects and arrays are allowed")
    for path, part in _schemas(schema):
        _check_part(path, part)


def _deep(schema: Any) -> bool:
    level = [schema]
    for _ in range(MAX_DEPTH):
        level = [child for node in level if isinstance(node, (dict, list))
                 for child in (node.values() if isinstance(node, dict) else node) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _check_part(path: str, part: Mapping[str, Any]) -> None:
    for name in LEFT_OUT:
        if name in part:
            raise ValueError(f"{name} is not supported (at {path})")
    if part.get("uniqueItems"):
        raise ValueError(f"uniqueItems is not supported (at {path})")
    for one, other in CLASHES:
        if one in part and other in part:
            raise ValueError(f"{other} beside {one} is not supported (at {path})")
    if isinstance(part.get("patternProperties"), dict) and len(part["patternProperties"]) > 1:
        raise ValueError(f"more than one of patternProperties is not supported (at {path})")
    names = part.get("propertyNames")
    if isinstance(names, dict) and any(name in names for name in LENGTHS) and ("pattern" in names or "format" in names):
        raise ValueError(f"a pattern and a length in propertyNames are not supported (at {path})")
    if isinstance(part.get("format"), str) and part["format"] not in FORMATS:
        raise ValueError(f"the format {part['format'][:40]!r} is not supported (at {path})")
    if isinstance(part.get("allOf"), list) and len(part["allOf"]) > 1:
        raise ValueError(f"allOf with more than one schema is not supported (at {path})")
    own = next((name for name in EXCLUSIVE if name in part), None)
    if own is not None:
        beside = sorted(CONSTRAINTS & part.keys() - {own})
        if beside:
            raise ValueError(f"{beside[0]} beside {own} is not supported (at {path})")
    ref = part.get("$ref")
    if isinstance(ref, str) and ref != "#" and not ref.startswith("#/"):
        raise ValueError(f"$ref must point into the schema itself, as in #/$defs/name (at {path})")
    by_pattern = part.get("patternProperties")
    patterns = [part.get("pattern"), *(by_pattern if isinstance(by_pattern, dict) else ())]
    if any(isinstance(pattern, str) and _LOOK_AROUND.search(pattern) for pattern in patterns):
        raise ValueError(f"patterns that look ahead or behind are not supported (at {path})")


def _schemas(schema: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema in a schema, with its path. Names of properties are no keywords and are passed over.

    Raises:
        ValueError: there are more than `MAX_SCHEMAS`.
    """
    waiting: list[tuple[str, Any]] = [("the top", schema)]
    count = 0
    while waiting:
        path, part = waiting.pop()
        if not isinstance(part, dict):
            continue
        count += 1
        if count > MAX_SCHEMAS:
            raise ValueError(f"it holds more than {MAX_SCHEMAS} schemas")
        yield path, part
        here = "" if path == "the top" else f"{path}."
        waiting += [(f"{here}{name}", part[name]) for name in ONE_SCHEMA if name in part]
        for name in LISTS:
            if isinstance(part.get(name), list):
                waiting += [(f"{here}{name}[{i}]", one) for i, one in enumerate(part[name])]
        for name in MAPS:
            if isinstance(part.get(name), dict):
                waiting += [(f"{here}{name}.{key}", one) for key, one in part[name].items()]
