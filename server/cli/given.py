"""What flags and files of prompts hold, as values. Whatever cannot be read is refused with the name of the flag."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from steering.language.errors import InvalidRequest


def json_or_text(text: str) -> Any:
    """JSON where it is some, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def json_object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"this is no JSON: {error}", param=option) from error
    if not isinstance(value, dict):
        raise InvalidRequest("this is no JSON object", param=option)
    return value


def assigned(written: Iterable[str], option: str) -> Iterator[tuple[str, str]]:
    """Name and value of each NAME=VALUE."""
    for one in written:
        name, equals, value = one.partition("=")
        if not (name and equals):
            raise InvalidRequest(f"{one!r} is not NAME=VALUE", param=option)
        yield name, value


def numbers(text: str, kind: type[int] | type[float], option: str) -> list[int] | list[float]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidRequest(f"{text!r} is no list of numbers", param=option, fix="Write 3 or 3,4.") from error


def layers_of(text: str | None, option: str = "--layers") -> list[int] | None:
    """Layers as they are written, `3`, `3,4` or `3-6`; None where none are."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if match is None:
            raise InvalidRequest(f"{text!r} names no layers", param=option, fix="Write 3, 3,4 or 3-6.")
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1)
    return found


def questions(path: Path, option: str) -> list[tuple[Any, list[str] | None]]:
    """Each prompt of a file, with its right answers where the line has `expected`. A line is a plain text, or JSON with
    `messages`, `text` or `prompt`."""
    found: list[tuple[Any, list[str] | None]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        record = json_object(line, option) if line.startswith("{") else {"text": line}
        prompt = record.get("messages", record.get("text", record.get("prompt")))
        if prompt is None:
            raise InvalidRequest(f"{path.name} line {number} has none of text, prompt and messages", param=option)
        expected = record.get("expected")
        found.append((prompt, [expected] if isinstance(expected, str) else expected))
    return found


def prompts(path: Path, option: str) -> list[Any]:
    """Each prompt of a file, see `questions`."""
    return [prompt for prompt, _ in questions(path, option)]
