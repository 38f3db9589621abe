"""Receipts of finished requests, kept for a while for clients that drop fields they do not know.

They lie in memory, because a receipt tells of one answer of one server: after a restart nobody can ask for the answer
either. What is kept is bounded in time and in bytes, and the oldest make room first.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from server.requests.receipt import Receipt

# The one that is too large to share the room with others is not kept at all.
LARGEST_SHARE = 4


@dataclass(frozen=True)
class _Entry:
    since: float
    content: bytes


class KeptReceipts:
    """By the part of a request's id that the ids of its answers share: `req-X`, `chatcmpl-X` and `cmpl-X` are one."""

    def __init__(self, *, most_bytes: int, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes, self._seconds, self._now = most_bytes, seconds, now
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, request_id: str, receipt: Receipt) -> None:
        """Keep what is not too large for it. Blocks for as long as the receipt takes to be written as JSON."""
        content = receipt.model_dump_json(exclude_unset=True).encode()
        with self._lock:
            self._drop(key_of(request_id))
            if len(content) * LARGEST_SHARE <= self._most_bytes:
                self._entries[key_of(request_id)] = _Entry(self._now(), content)
                self.nbytes += len(content)
            self._make_room()

    def find(self, some_id: str) -> bytes | None:
        """The receipt as JSON, None where it is not kept (any more)."""
        with self._lock:
            self._make_room()
            entry = self._entries.get(key_of(some_id))
        return None if entry is None else entry.content

    def _make_room(self) -> None:
        oldest = self._now() - self._seconds
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.since > oldest and self.nbytes <= self._most_bytes:
                return
            self._drop(key)

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.nbytes -= len(entry.content)


def key_of(some_id: str) -> str:
    """What the ids of a request and of its answers have in common: all after the first `-` or `_`."""
    return some_id.replace("_", "-", 1).rpartition("-")[2]
