"""What is wrong with a JSON text, and where: slow and exact, for short texts that `strict_json` has refused."""

import json
import math
from typing import Any

from server.errors import InvalidJson
from steering.language.errors import Path

MAX_DEPTH = 64
MAX_INTEGER = 2**64
# Steps of a path that an error names where the fault is the depth itself.
NAMED_DEPTH = 16


def explain(body: bytes, *, max_depth: int = MAX_DEPTH) -> None:
    """Find the first fault of a JSON text, if it has one.

    Raises:
        InvalidJson: malformed, not UTF-8, nested too deeply, a key given twice, NaN or infinity, a number beyond
            64 bits, or half a surrogate pair; `path` leads to the value where there is one.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"the body is not valid UTF-8 (byte {error.start})", param="body",
                          fix="Send JSON encoded as UTF-8.") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise InvalidJson(f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})",
                          param="body") from None
    except RecursionError:
        raise InvalidJson("the body is nested too deeply", param="body",
                          fix=f"Use {max_depth} levels at most.") from None
    except ValueError:
        # The interpreter refuses to convert numbers of thousands of digits.
        raise InvalidJson("the body holds a number with too many digits", param="body") from None
    _check(value, max_depth)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidJson(f"the field {key[:80]!r} is given twice in one object", param=key)
            seen.add(key)
    return found


def _check(root: Any, max_depth: int) -> None:
    # Not recursive: depth is one of the things that is checked.
    stack: list[tuple[Any, Path]] = [(root, ())]
    while stack:
        value, path = stack.pop()
        if isinstance(value, str):
            if not value.isascii() and not _encodable(value):
                raise InvalidJson("the text holds half a surrogate pair", param=path or "body")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise InvalidJson("NaN and infinity are not JSON numbers", param=path or "body",
                                  fix="Send a finite number.")
        elif isinstance(value, int):
            if abs(value) > MAX_INTEGER:
                raise InvalidJson("the number is larger than 64 bits", param=path or "body")
        elif isinstance(value, (list, dict)):
            if len(path) >= max_depth:
                raise InvalidJson("the body is nested too deeply", param=path[:NAMED_DEPTH] or "body",
                                  fix=f"Use {max_depth} levels at most.")
            if isinstance(value, list):
                # In reverse, so that the first fault is the one that is named.
                stack += [(value[i], (*path, i)) for i in reversed(range(len(value)))
                          if not _plain(value[i])]
            else:
                for key, item in value.items():
                    if not _encodable(key):
                        raise InvalidJson("a field name holds half a surrogate pair", param=path or "body")
                    if not _plain(item):
                        stack.append((item, (*path, key)))


def _plain(value: Any) -> bool:
    """Whether nothing can be wrong with the value; spares long lists of numbers their paths."""
    return value is None or isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)) \
        or (isinstance(value, str) and value.isascii())


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
