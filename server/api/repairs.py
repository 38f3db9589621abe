"""What a value that was refused may have been meant as: the form that works, to be shown in the error's fix.

Forms are tried, not guessed: one is told only where the request would be taken with it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from steering.language.errors import Path

# Longer than that, a request is not tried again: an error must not cost more than an answer.
MOST_NODES = 2000
LONGEST_SHOWN = 200
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII)
_WITH_UNIT = re.compile(rf"({_NUMBER.pattern})\s*([a-z]+)", re.ASCII)
_RANGE = re.compile(r"(\d{1,4})\s*(?:-|\.\.|:)\s*(\d{1,4})", re.ASCII)


def repaired(path: Path, body: Any, annotation: Any) -> str | None:
    """The field at `path` as it would be taken, `"layers": [3]` say; None where nothing that was tried works."""
    if not path or not isinstance(body, Mapping) or not isinstance(path[0], str):
        return None
    part = {path[0]: body.get(path[0])}
    if _nodes(part, MOST_NODES) >= MOST_NODES:
        return None
    for place in (path, path[:-1]):
        bad = _at(part, place)
        for form in _forms(bad) if place == path else _wrapped(bad):
            shown = json.dumps(form, ensure_ascii=False)
            if len(shown) <= LONGEST_SHOWN and _taken(place, _with(part, place, form), annotation):
                return shown if isinstance(place[-1], int) else f"{json.dumps(place[-1])}: {shown}"
    return None


def _forms(bad: Any) -> Iterator[Any]:
    """What people write for what, plainest first."""
    if isinstance(bad, str):
        text = bad.strip()
        if _NUMBER.fullmatch(text):
            number = _number(text)
            yield from (number, [number])
        if found := _WITH_UNIT.fullmatch(text):
            yield {"kl": _number(found[1])} if found[4] == "kl" else {"value": _number(found[1]), "unit": found[4]}
        if text.lower() in ("true", "false"):
            yield text.lower() == "true"
        if found := _RANGE.fullmatch(text):
            yield {"start": int(found[1]), "stop": int(found[2]) + 1}
        parts = [part.strip() for part in text.split(",")]
        if len(parts) > 1 and all(map(_NUMBER.fullmatch, parts)):
            yield [_number(part) for part in parts]
        if text.startswith(("{", "[")):
            try:
                yield json.loads(text)
            except ValueError:
                return
        yield from ({"artifact": bad}, {"probe": bad}, {"kind": bad}, [{"artifact": bad}],
                    [{"role": "user", "content": bad}])
    if isinstance(bad, list):
        if len(bad) == 1:
            yield bad[0]
        names = [{"artifact": item} if isinstance(item, str) else item for item in bad]
        yield from (names, {"interventions": names})
    if isinstance(bad, float) and bad.is_integer():
        yield int(bad)
    if bad is not None and not isinstance(bad, list):
        yield [bad]
    yield from _wrapped(bad)


def _wrapped(bad: Any) -> Iterator[Any]:
    """An intervention where a list of them is wanted."""
    if isinstance(bad, Mapping) and "artifact" in bad and "interventions" not in bad:
        beside = {name: value for name, value in bad.items() if name in ("report", "preset", "default", "graders")}
        item = {name: value for name, value in bad.items() if name not in beside}
        yield {"interventions": [item], **beside}


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() and re.fullmatch(r"[-+]?\d{1,9}", text) else value


def _taken(path: Path, part: Any, annotation: Any) -> bool:
    """Whether nothing at the path, below it or around it is refused. What else the body needs is not there and does not
    count."""
    try:
        TypeAdapter(annotation).validate_python(part)
    except ValidationError as error:
        found = [place_of(complaint, part) for complaint in error.errors(include_url=False, include_context=False)]
        return not any(place and (place[:len(path)] == path or path[:len(place)] == place) for place in found)
    return True


def place_of(complaint: Mapping[str, Any], value: Any) -> Path:
    """The complaint's location without the names of union branches, which are no part of the body."""
    path: list[str | int] = []
    parts = complaint["loc"]
    node = value
    for i, part in enumerate(parts):
        if _has(node, part):
            node = node[part]
            path.append(part)
        elif complaint["type"] == "missing" and i == len(parts) - 1:
            path.append(part)
    return tuple(path)


def _has(node: Any, part: str | int) -> bool:
    if isinstance(part, int):
        return isinstance(node, list) and 0 <= part < len(node)
    return isinstance(node, dict) and part in node


def _at(body: Any, path: Path) -> Any:
    for part in path:
        try:
            body = body[part]
        except (KeyError, IndexError, TypeError):
            return None
    return body


def _with(body: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(body, Mapping):
        return {**body, first: _with(body.get(first), tuple(rest), value)}
    if isinstance(body, list) and isinstance(first, int):
        return [_with(item, tuple(rest), value) if n == first else item for n, item in enumerate(body)]
    return value


def _nodes(value: Any, most: int) -> int:
    """How many values there are, counted up to `most`."""
    count, left = 0, [value]
    while left and count < most:
        one = left.pop()
        count += 1
        if isinstance(one, Mapping):
            left += list(one.values())
        elif isinstance(one, list):
            left += one[:most]
    return count
