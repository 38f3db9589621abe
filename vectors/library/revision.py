"""Whether the library has changed: a number in its database that every change raises.

What was read of the library is true as long as the number stays. A change of this process is known when it is stored.
One of another process is known within `FRESH_S`, as the database is asked for the number no more often than that, and
at once where the database is a file on this machine, as its files then change.
"""

import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

from cachetools import LRUCache
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from vectors.library.tables import RevisionRow

FRESH_S = 0.5
Value = TypeVar("Value")


def revision_of(session: Session) -> int:
    """The number as this transaction sees it."""
    return session.scalars(select(RevisionRow.number)).one()


def raised(session: Session) -> int:
    """Raise the number. It is the last thing that a transaction does, so that writers wait for one another here and
    nowhere before."""
    session.flush()
    session.execute(update(RevisionRow).values(number=RevisionRow.number + 1))
    return revision_of(session)


class Revision:
    """The number as far as this process knows. Safe to use from several threads.

    Args:
        read: asks the database.
        trace: something cheap that differs after a change of another process, as far as that can be had.
    """

    def __init__(self, read: Callable[[], int], trace: Callable[[], object] = lambda: None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._trace, self._clock = read, trace, clock
        self._seen: object = None
        self._lock = threading.Lock()
        self._known = 0
        self._fresh_until = float("-inf")
        self._writes = 0

    def current(self) -> int:
        """The number, from the database where it was not asked lately."""
        # Both are taken before the number is read, so that a change that comes later is not taken for a known one.
        began, seen = self._clock(), self._trace()
        with self._lock:
            if began < self._fresh_until and seen == self._seen:
                return self._known
            writes = self._writes
        found = self._read()
        with self._lock:
            # If this process changed the library meanwhile, the number that was read may be older than its change.
            if writes == self._writes:
                self._known, self._fresh_until, self._seen = found, began + FRESH_S, seen
            return self._known

    def wrote(self, number: int) -> None:
        """A change of this process is stored."""
        with self._lock:
            self._writes += 1
            self._known = max(self._known, number)


class Reader(Protocol):
    """What a memory needs of the database."""

    revision: Revision

    def snapshot(self, work: Callable[[Session], Value]) -> Value: ...


class Memory(Generic[Value]):
    """What was read of the library, by what was asked for. Nothing of it is used once the library has changed."""

    def __init__(self, database: Reader, most: int) -> None:
        self._database = database
        self._entries: LRUCache[Hashable, tuple[int, Value]] = LRUCache(most)
        self._lock = threading.Lock()

    def get(self, key: Hashable, read: Callable[[Session], Value]) -> Value:
        """What `read` says of `key`, from memory where that is still true. What it raises is not kept."""
        current = self._database.revision.current()
        with self._lock:
            entry = self._entries.get(key)
        if entry is not None and entry[0] == current:
            return entry[1]
        number, value = self._database.snapshot(lambda session: (revision_of(session), read(session)))
        with self._lock:
            self._entries[key] = number, value
        return value
