"""Requests without input or output: what to send and how to read the answer, run alike by both clients."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """A whole response of status below 400."""

    status: int
    content: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request. `read` turns its answer into the result; `json` and `content` exclude each other."""

    method: str
    path: str
    read: Callable[[Answer], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stream(Generic[T]):
    """One request whose answer is a stream of events. `read` turns the data of one event into an item, or where the
    stream is `raw` each piece of the answer as it comes."""

    method: str
    path: str
    read: Callable[[bytes], T]
    json: Any = None
    raw: bool = False


@dataclass(frozen=True)
class Pause:
    """Wait so long before the next request."""

    seconds: float


Flow = Generator["Call[Any] | Pause", Any, T]
"""Several requests after another: yields a `Call` and is sent its result, or a `Pause` and is sent None."""


def event_data(line: str) -> bytes | None:
    """Data of one line of a stream of server-sent events; None for lines without any, and for the end."""
    if not line.startswith("data:"):
        return None
    data = line[5:].strip()
    return None if data == "[DONE]" else data.encode()
