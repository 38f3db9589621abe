"""Whether the library has changed: a number in its database that every change raises.

What was read of the library is true as long as the number stays. A change of this process is known when it is stored.
One of another process is known within `FRESH_S`, as the database is asked for the number no more often than that. It is
known at once where the database is a file on this machine, as its files then change, and where it is PostgreSQL, which
tells whoever listens (`vectors.library.listening`).
"""

import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

from cachetools import LRUCache
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from vectors.library.tables import RevisionRow

FRESH_S = 0.25
# A change of another process counts as late if it may have been made longer ago than this.
LATE_S = 1.0
# What a transaction of PostgreSQL tells, once it is committed, on this channel.
CHANNEL = "trimtab_library"
Value = TypeVar("Value")


def revision_of(session: Session) -> int:
    """The number as this transaction sees it."""
    return session.scalars(select(RevisionRow.number)).one()


def raised(session: Session) -> int:
    """Raise the number. It is the last thing that a transaction does, so that writers wait for one another here and
    nowhere before."""
    session.flush()
    session.execute(update(RevisionRow).values(number=RevisionRow.number + 1))
    number = revision_of(session)
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_notify(:channel, :number)"), {"channel": CHANNEL, "number": str(number)})
    return number


def held(session: Session) -> int:
    """Hold the number as `raised` does, and leave it: nothing that others remember of the library was changed."""
    session.flush()
    session.execute(update(RevisionRow).values(number=RevisionRow.number))
    return revision_of(session)


class Revision:
    """The number as far as this process knows. Safe to use from several threads.

    Args:
        read: asks the database.
        trace: something cheap that differs after a change of another process, as far as that can be had.

    Attributes:
        late: called when a change is found that may have been made more than `LATE_S` ago, because nobody told of it
            and the database was not asked, or did not answer, for so long.
    """

    def __init__(self, read: Callable[[], int], trace: Callable[[], object] = lambda: None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._trace, self._clock = read, trace, clock
        self._seen: object = None
        self.late: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._known = 0
        self._asked: float | None = None
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
            asked, self._asked = self._asked, began
            late = asked is not None and found > self._known and self._clock() - asked > LATE_S
            # If this process changed the library meanwhile, the number that was read may be older than its change.
            if writes == self._writes:
                self._known, self._fresh_until, self._seen = found, began + FRESH_S, seen
            known = self._known
        if late:
            self.late()
        return known

    def wrote(self, number: int) -> None:
        """A change is stored, of this process or of one that told of it."""
        with self._lock:
            self._writes += 1
            self._known = max(self._known, number)

    def expire(self) -> None:
        """Ask the database when the number is next wanted."""
        with self._lock:
            self._fresh_until = float("-inf")


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
