"""What a transaction changed, noted while it works and sealed into the chain at its end.

The end of a transaction holds the row of the library's revision (see `vectors.library.revision.raised`), so writers of
all processes are in one order there, and the chain needs no lock of its own.
"""

import hashlib
import json
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import event, insert, select
from sqlalchemy.orm import ORMExecuteState, Session

from steering.language.finite import finite
from vectors.library.audit.chain import BEGINNING, Record
from vectors.library.spaces import HOUSE
from vectors.library.tables import AuditRow

# A value that takes more is told by its digest.
MOST_TOLD = 16 * 2**10
LONGEST_TARGET = 200
_NOTES, _CHANGED = "audit.notes", "audit.changed"


@dataclass(frozen=True)
class Actor:
    """Who changes something, and from where. key_id: None where no key of the library was used."""

    key_id: str | None = None
    key_name: str = "local"
    tenant: str = ""
    address: str = ""
    request_id: str = ""


# Who opens the library without a server, and the server's own work, have no name but this.
LOCAL = Actor()
ACTOR: ContextVar[Actor] = ContextVar("actor", default=LOCAL)


def maker() -> str:
    """The tenant whose what is made now will be."""
    return ACTOR.get().tenant or HOUSE


@dataclass(frozen=True)
class Note:
    """One change. at: None for the time at which it is sealed."""

    action: str
    target: str
    before: Any = None
    after: Any = None
    actor: Actor | None = None
    at: datetime | None = None


class Writing(Session):
    """A session that knows whether rows were changed through it."""


@event.listens_for(Writing, "after_flush")
def _flushed(session: Session, _: object) -> None:
    session.info[_CHANGED] = True


@event.listens_for(Writing, "do_orm_execute")
def _executed(state: ORMExecuteState) -> None:
    if state.is_insert or state.is_update or state.is_delete:
        state.session.info[_CHANGED] = True


def note(session: Session, action: str, target: str, *, before: Any = None, after: Any = None,
         actor: Actor | None = None, at: datetime | None = None) -> None:
    """Say what the transaction of `session` changes. `actor`: by default who asks for it in this context."""
    session.info.setdefault(_NOTES, []).append(
        Note(action, target[:LONGEST_TARGET], told(before), told(after), actor or ACTOR.get(), at))


def check_noted(session: Session) -> None:
    """Raises RuntimeError: rows were changed, and nothing was noted of it."""
    session.flush()
    if session.info.get(_CHANGED) and not session.info.get(_NOTES):
        raise RuntimeError("the library was changed without a record in the audit")


def seal(session: Session) -> None:
    """Write the notes of the transaction into the chain. The row of the revision has to be held."""
    notes: list[Note] = session.info.get(_NOTES, [])
    if not notes:
        return
    last = session.execute(select(AuditRow.number, AuditRow.digest).order_by(AuditRow.number.desc()).limit(1)).first()
    number, previous = (0, BEGINNING) if last is None else (last.number, last.digest)
    rows = []
    for one in notes:
        number += 1
        record = Record(number, one.at or datetime.now(UTC), one.action, one.target, one.before, one.after,
                        **vars(one.actor or LOCAL), previous=previous)
        previous = record.digested()
        rows.append({**vars(record), "before": _text(record.before), "after": _text(record.after), "digest": previous})
    # All at once, which for hundreds of them takes a third of the time of one by one.
    session.execute(insert(AuditRow), rows)


def told(value: Any) -> Any:
    """What a record says of a value: itself as JSON reads it back, or its digest where it takes too much room."""
    text = written(value)
    if text is None:
        return None
    if len(text) > MOST_TOLD:
        return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)}
    return json.loads(text)


def written(value: Any) -> str | None:
    return _text(finite(value))


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
