"""Numbers that are not finite: where they stand in plain data, and the same data without them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steering.language.errors import Path


def not_finite(value: Any, path: Path = ()) -> Iterator[Path]:
    """The path of each float in plain data (dicts, lists, numbers, text) that is NaN or infinite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield path
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from not_finite(item, (*path, str(key)))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for i, item in enumerate(value):
            yield from not_finite(item, (*path, i))


def finite(value: Any) -> Any:
    """The same data with None in place of floats that are NaN or infinite, as JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
