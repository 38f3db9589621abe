"""Contrastive pairs from a file: one JSON object a line, or one JSON list."""

import json
from pathlib import Path
from typing import Any

from steering.errors import InvalidRequest

SIDES = ("positive", "negative")


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The pairs as `POST /v1/extract` takes them. Fields that it does not know (labels, notes) are left out.

    `positive_messages` and `negative_messages`, where a data set has them, win over the rendered texts: the server
    then applies the chat template of the model it has loaded.

    Raises:
        InvalidRequest: naming the line.
    """
    return [_pair(record, f"{path.name}[{number}]") for number, record in enumerate(_records(path))]


def _records(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        found = _parsed(text, path.name)
        return found if isinstance(found, list) else []
    return [_parsed(line, f"{path.name} line {number}") for number, line in enumerate(text.splitlines(), 1)
            if line.strip()]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{where} is no JSON: {error}", param="--pairs") from error


def _pair(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InvalidRequest(f"{where} is no JSON object", param="--pairs",
                             fix='Write {"positive": "...", "negative": "..."}.')
    pair = {}
    for side in SIDES:
        value = record.get(f"{side}_messages", record.get(side))
        if value is None:
            raise InvalidRequest(f"{where} has no {side} text", param="--pairs",
                                 fix='Write {"positive": "...", "negative": "..."}.')
        pair[side] = value
    return {**pair, **{name: record[name] for name in ("item", "split") if record.get(name) is not None}}
