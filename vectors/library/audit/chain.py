"""Records and what joins them: each holds the SHA-256 of the one before it, and its own covers all that it says.

Whoever alters a record has to alter all that follow, and whoever has noted a later digest elsewhere sees it. Records
that were removed by age leave a trace in the chain itself: the record of the removal names the last one and its digest.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

# What the first record holds in place of a digest.
BEGINNING = "0" * 64
# The action of the record that a removal by age leaves.
EXPIRED = "audit.expire"


@dataclass(frozen=True)
class Record:
    """
    Attributes:
        number: 1 for the first of a library, then without gaps.
        at: aware, in UTC.
        action: what was done, `preset.create` say. target: to what.
        before, after: what it was and what it became, as JSON values; None where there was or is nothing.
        key_id: None for the key of the settings, and for work that nobody asked for with a key.
        address: where the request came from, "" for the server's own work.
        previous: digest of the record before.
    """

    number: int
    at: datetime
    action: str
    target: str
    before: Any
    after: Any
    key_id: str | None
    key_name: str
    tenant: str
    address: str
    request_id: str
    previous: str
    digest: str = ""

    def digested(self) -> str:
        """The digest that this record has to have. It is taken of JSON with sorted keys and no spaces."""
        told = {**vars(self), "at": self.at.isoformat(timespec="microseconds")}
        del told["digest"]
        text = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What a check of the chain found. first, last: numbers of the records that were read; head: the last one's digest.
    fault: None where the chain is whole."""

    records: int
    first: int | None
    last: int | None
    head: str
    fault: str | None = None


def verify(records: Iterable[Record], *, known: tuple[int, str] | None = None) -> Verdict:
    """Check records that follow one another, oldest first.

    Args:
        known: number and digest of a record that was noted elsewhere, which the chain has to contain.
    """
    first: Record | None = None
    last: Record | None = None
    expired: tuple[int, str] | None = None
    count, seen = 0, False

    def verdict(fault: str | None) -> Verdict:
        return Verdict(count, first.number if first else None, last.number if last else None,
                       last.digest if last else BEGINNING, fault)

    for record in records:
        if record.digest != record.digested():
            return verdict(f"record {record.number} was altered")
        if last is None:
            first = record
        elif record.number != last.number + 1:
            return verdict(f"records {last.number + 1} to {record.number - 1} are missing")
        elif record.previous != last.digest:
            return verdict(f"record {record.number} does not follow the record before it")
        if record.action == EXPIRED and isinstance(record.after, dict):
            expired = record.after["last"], record.after["digest"]
        seen = seen or known == (record.number, record.digest)
        count, last = count + 1, record
    if first is not None and (first.number, first.previous) != (1, BEGINNING) and (
            expired != (first.number - 1, first.previous)):
        return verdict(f"the records before {first.number} are missing, and none says that they were removed by age")
    if known is not None and not seen:
        return verdict(f"record {known[0]} with the digest {known[1][:12]}... is not in the chain")
    return verdict(None)
