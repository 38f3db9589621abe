"""Pydantic's complaints as one typed error: the field by its path in the body, what is wrong, and the fix."""

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter

from server.api.repairs import place_of, repaired
from server.errors import UnsupportedParameter
from steering.language.errors import InvalidRequest, InvalidSpec, Path, printable

_PYTHON_WORDS = re.compile(r"a valid dictionary( or (object to extract fields from|instance of \w+))?")
Complaint = Mapping[str, Any]


def invalid(complaints: Sequence[Complaint], value: Any, annotation: Any) -> InvalidRequest:
    """The error to answer with.

    Args:
        complaints: `ValidationError.errors()`, locations relative to `value`.
        value: the parsed body that was validated.
        annotation: the type it was validated against.
    """
    located = _relevant([(place_of(c, value), c) for c in complaints], annotation)
    depth = max(len(path) for path, _ in located)
    deepest = [(path, c) for path, c in located if len(path) == depth]
    path, _ = next((item for item in deepest if item[1]["type"] == "extra_forbidden"), deepest[0])
    same = [c for other, c in deepest if other == path]
    first = next((c for c in same if c["type"] == "extra_forbidden"), same[0])
    param = path or "body"
    if first["type"] == "unsupported_parameter":
        return UnsupportedParameter(str(first["msg"]), param=param, fix="Leave the field out.")
    kind = InvalidSpec if path and path[0] == "steering" else InvalidRequest
    if first["type"] == "extra_forbidden":
        works = repaired(path, value, annotation)
        return kind(f"unknown field {printable(str(path[-1]))!r}", param=param, fix=f"Write {works}." if works else
                    _suggestion(str(path[-1]), _known_fields(path[:-1], annotation)))
    if first["type"] == "missing" and not path:
        return kind("the body is null", param=param, fix="Send a JSON object.")
    if first["type"] == "missing":
        return kind("the field is required", param=param, fix=f"Give {path[-1]}.")
    messages = list(dict.fromkeys(_message(c) for c in same))
    works = repaired(path, value, annotation)
    return kind(", or ".join(messages[:4]), param=param, fix=None if works is None else f"Write {works}.")


def _relevant(located: list[tuple[Path, Complaint]], annotation: Any) -> list[tuple[Path, Complaint]]:
    """Without what a form that the value has not says of names that belong to another form of the same field."""
    others = {c["loc"][:-1] for path, c in located
              if c["type"] == "extra_forbidden" and path and path[-1] in _known_fields(path[:-1], annotation)}
    return [(path, c) for path, c in located if c["loc"][:-1] not in others] or located


def _message(complaint: Complaint) -> str:
    text = str(complaint["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return _PYTHON_WORDS.sub("an object", text)[:300]


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Fields here: {', '.join(known[:40])}." if known else "Leave it out."


def _known_fields(path: Sequence[str | int], annotation: Any) -> list[str]:
    """Names that objects at `path` may have, out of the JSON schema of the annotation."""
    schema = _schema(annotation)
    nodes = _alternatives([schema], schema)
    for part in path:
        below: list[Any] = []
        for node in nodes:
            if isinstance(part, int):
                below += [node.get("items"), *node.get("prefixItems", [])]
            else:
                below.append(node.get("properties", {}).get(part, node.get("additionalProperties")))
        nodes = _alternatives(below, schema)
    return sorted({name for node in nodes for name in node.get("properties", {})})


def _alternatives(nodes: Sequence[Any], root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for node in nodes:
        if not isinstance(node, dict):
            continue
        if "$ref" in node:
            found += _alternatives([root["$defs"][node["$ref"].rsplit("/", 1)[-1]]], root)
            continue
        found.append(node)
        found += _alternatives([*node.get("anyOf", []), *node.get("oneOf", []), *node.get("allOf", [])], root)
    return found


@lru_cache(maxsize=64)
def _schema(annotation: Any) -> dict[str, Any]:
    return TypeAdapter(annotation).json_schema()
