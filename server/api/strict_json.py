"""Request bodies as JSON, read strictly: what one reader could take for something else is refused before validation.

The parser and the checks run at the speed of C whatever the text is made of, since they hold up the event loop: Python
steps from depth to depth, never from value to value, and the number of containers is bounded.
"""

import re
from array import array
from itertools import chain
from typing import Any

import numpy as np
from pydantic_core import from_json

from server.api.json_faults import MAX_DEPTH, MAX_INTEGER, explain
from server.errors import InvalidJson

MAX_CONTAINERS = 100_000
MAX_FIELDS = 10_000
# Texts up to this size are gone through value by value where they are refused, so that the error names the place.
EXPLAINED_BYTES = 2**18
_COLON_ESCAPE = re.compile(rb"(?<!\\)(?:\\\\)*\\u003[aA]")


def parse_json(body: bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        InvalidJson: malformed, not UTF-8, nested too deeply, a key given twice, NaN or infinity, a number beyond
            64 bits, half a surrogate pair, more than `MAX_CONTAINERS` objects and lists, or one of more than
            `MAX_FIELDS` fields; `param` is the path of the value where the text is short enough to be searched for it.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        _explain(body, max_depth)
        raise InvalidJson(f"the body is not valid JSON: {error}", param="body") from None
    fault = _fault(value, body, max_depth)
    if fault is not None:
        _explain(body, max_depth)
        raise InvalidJson(fault, param="body")
    return value


def _explain(body: bytes, max_depth: int) -> None:
    if len(body) <= EXPLAINED_BYTES:
        explain(body, max_depth=max_depth)


def _fault(root: Any, body: bytes, max_depth: int) -> str | None:
    """What is wrong with a parsed value, None if nothing is.

    A key given twice is found by counting: outside of strings each pair of a text has one colon, and a pair that
    another one has overwritten is missing among the parsed.
    """
    containers = pairs = colons_in_strings = 0
    items: list[Any] = [root]
    for depth in range(max_depth + 1):
        # All values at one depth together: what is done with them is done by C.
        if _plain_numbers(items):
            break
        kinds = set(map(type, items))
        if str in kinds:
            colons_in_strings += "".join([item for item in items if type(item) is str]).count(":")
        if (float in kinds or int in kinds) and not _plain_numbers([i for i in items if type(i) in (int, float)]):
            return "the body holds a number that is not finite or larger than 64 bits"
        objects = [item for item in items if type(item) is dict] if dict in kinds else []
        lists = [item for item in items if type(item) is list] if list in kinds else []
        if not objects and not lists:
            break
        containers += len(objects) + len(lists)
        if containers > MAX_CONTAINERS:
            return f"the body holds more than {MAX_CONTAINERS} objects and lists"
        if depth == max_depth:
            return "the body is nested too deeply"
        if max(map(len, objects), default=0) > MAX_FIELDS:
            return f"an object of the body has more than {MAX_FIELDS} fields"
        pairs += sum(map(len, objects))
        colons_in_strings += "".join(chain.from_iterable(objects)).count(":")
        items = list(chain.from_iterable(chain(lists, map(dict.values, objects))))
    escaped = len(_COLON_ESCAPE.findall(body)) if b"\\u003" in body else 0
    if body.count(b":") + escaped - colons_in_strings != pairs:
        return "a field is given twice in one object"
    return None


def _plain_numbers(items: list[Any]) -> bool:
    """Whether a list holds only numbers, none of them infinite or beyond 64 bits; in one pass where it does."""
    try:
        array("q", items)
        return True
    except (TypeError, OverflowError):
        pass
    try:
        numbers = np.frombuffer(array("d", items))
    except (TypeError, OverflowError):
        return False
    if not np.isfinite(numbers).all():
        return False
    small = bool((abs(numbers) < MAX_INTEGER / 2).all())
    return small or not any(type(i) is int and abs(i) > MAX_INTEGER for i in items)
