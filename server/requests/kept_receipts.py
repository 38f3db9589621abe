"""Receipts of finished requests, kept for a while for clients that drop fields they do not know.

They lie in memory, because a receipt tells of one answer of one server: after a restart nobody can ask for the answer
either. What is kept is bounded in time and in bytes, and the oldest make room first.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Self

from pydantic import BaseModel, Field

from server.requests.receipt import Receipt
from vectors.library.audit.notes import maker
from vectors.library.spaces import READER

# The one that is too large to share the room with others is not kept at all.
LARGEST_SHARE = 4
# How many are looked through for those of one artifact.
MOST_LOOKED_AT = 5000


class ReceiptSummary(BaseModel):
    """One line of a list of receipts: enough to choose which to open."""

    id: str = Field(description="Of the request: X-Trimtab-Request.")
    ended_at: float = Field(description="Seconds since 1970.")
    applied: list[str] = Field(description="Artifacts in order of action, with version; inline for numbers given so.")
    presets: list[str] = Field(description="With version.")
    disabled: bool
    tokens: int = Field(description="Tokens that interventions acted on, prompt and completion, the most of any.")
    kl: float | None = Field(description="Nats a token that the answer was moved by; null where it was not measured.")
    repetition: float | None
    gates_shut: int = Field(description="Decisions of gates against acting.")
    guarded: int = Field(description="How often guards weakened an intervention.")
    warnings: int

    @classmethod
    def of(cls, request_id: str, ended_at: float, receipt: Receipt) -> Self:
        choices = [choice for item in receipt.applied for choice in item.choices]
        measured = receipt.effects.choices if receipt.effects is not None else []
        return cls(
            id=request_id, ended_at=ended_at, applied=[item.artifact for item in receipt.applied],
            presets=list(receipt.presets.values()), disabled=receipt.disabled,
            tokens=max((item.tokens.prompt + item.tokens.generation for item in receipt.applied), default=0),
            kl=_mean([one.total.kl.mean for one in measured]),
            repetition=_mean([one.text.repetition for one in measured]),
            gates_shut=sum(choice.gate is not None and not choice.gate.open for choice in choices),
            guarded=sum(len(choice.guard) for choice in choices), warnings=len(receipt.warnings))


@dataclass(frozen=True)
class _Entry:
    request_id: str
    tenant: str
    since: float
    ended_at: float
    content: bytes

    def summary(self) -> ReceiptSummary:
        return ReceiptSummary.of(self.request_id, self.ended_at, Receipt.model_validate_json(self.content))


class KeptReceipts:
    """By the part of a request's id that the ids of its answers share: `req-X`, `chatcmpl-X` and `cmpl-X` are one."""

    def __init__(self, *, most_bytes: int, seconds: float, now: Callable[[], float] = time.monotonic,
                 clock: Callable[[], float] = time.time) -> None:
        """now: a clock that never goes back, for ages. clock: seconds since 1970, for people."""
        self._most_bytes, self._seconds, self._now, self._clock = most_bytes, seconds, now, clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, request_id: str, receipt: Receipt) -> None:
        """Keep what is not too large for it. Blocks for as long as the receipt takes to be written as JSON."""
        content = receipt.model_dump_json(exclude_unset=True).encode()
        entry = _Entry(request_id, maker(), self._now(), self._clock(), content)
        with self._lock:
            self._drop(key_of(request_id))
            if len(entry.content) * LARGEST_SHARE <= self._most_bytes:
                self._entries[key_of(request_id)] = entry
                self.nbytes += len(entry.content)
            self._make_room()

    def find(self, some_id: str) -> bytes | None:
        """The receipt as JSON, None where it is not kept (any more) or is another tenant's."""
        with self._lock:
            self._make_room()
            entry = self._entries.get(key_of(some_id))
        return None if entry is None or not READER.get().sees(entry.tenant) else entry.content

    def newest(self, count: int, artifact: str | None = None) -> list[ReceiptSummary]:
        """Lines of those of the tenant that are kept, newest first. artifact: only of those that applied it, with
        version or by its bare name. Blocks for as long as the receipts take to be read."""
        with self._lock:
            self._make_room()
            own = (entry for entry in reversed(self._entries.values()) if READER.get().sees(entry.tenant))
            entries = list(islice(own, count if artifact is None else MOST_LOOKED_AT))
        summaries = (entry.summary() for entry in entries)
        return list(islice((one for one in summaries if artifact is None or _names(one, artifact)), count))

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


def _names(summary: ReceiptSummary, artifact: str) -> bool:
    return any(ref == artifact or ref.partition("@")[0] == artifact for ref in summary.applied)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def key_of(some_id: str) -> str:
    """What the ids of a request and of its answers have in common: all after the first `-` or `_`."""
    return some_id.replace("_", "-", 1).rpartition("-")[2]
