"""Settings of the whole library that requests feel: the default spec and the kill switch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from sqlalchemy.orm import Session

from steering.language.spec import Spec
from vectors.library.audit.notes import ACTOR, Actor, note
from vectors.library.database import Database
from vectors.library.naming import Ref
from vectors.library.revision import Memory
from vectors.library.spaces import FOR_ALL, check_shown
from vectors.library.specs import check_refs, from_json, named_in, refs_of, to_json
from vectors.library.tables import Setting, now

DEFAULT_SPEC = "default_spec"
KILL_SWITCH = "kill_switch"
# Who turned a switch stands in a row of its own, so that servers of an older version read the switch as before.
TURNED = "_turned"


@dataclass(frozen=True)
class Turn:
    """The kill switch was turned."""

    on: bool
    by: Actor
    at: datetime


@dataclass(frozen=True)
class Turned:
    """When a switch was last turned, and by whom: the name and tenant of a key, as the audit has them."""

    at: datetime
    by: str
    tenant: str

    @classmethod
    def of(cls, actor: Actor, at: datetime) -> Self:
        return cls(at, actor.key_name, actor.tenant)

    @classmethod
    def from_json(cls, found: dict[str, str]) -> Self:
        return cls(datetime.fromisoformat(found["at"]), found["by"], found["tenant"])

    def to_json(self) -> dict[str, str]:
        return {"at": self.at.isoformat(), "by": self.by, "tenant": self.tenant}


class Switches:
    """Shared by all processes that have the library open."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._kept: tuple[str, Spec] | None = None
        self._stored: Memory[str | None] = Memory(database, 1)

    def default_spec(self) -> Spec | None:
        """The spec that acts where a request does not say otherwise; None where none is set."""
        document = self._stored.get(DEFAULT_SPEC, _stored_default)
        if document is None:
            return None
        # Read once, and again where the library holds another one.
        kept = self._kept
        if kept is None or kept[0] != document:
            kept = self._kept = document, from_json(document, "the stored default spec")
        return kept[1]

    def default_spec_turned(self) -> Turned | None:
        """Who set or cleared it last; None where nobody did."""
        with self._database.read() as session:
            return _turned(session, DEFAULT_SPEC)

    def set_default_spec(self, spec: Spec) -> None:
        """Raises NotFound: the spec names an artifact that is not there. InvalidRequest: it names one of a tenant."""
        document = to_json(spec)

        def work(session: Session) -> None:
            check_refs(session, spec)
            check_shown(named_in(spec), FOR_ALL, "everybody whose requests the default spec acts on")
            _store_default(session, f"{DEFAULT_SPEC}.set", document)

        self._database.write(work)

    def clear_default_spec(self) -> None:
        self._database.write(lambda session: _store_default(session, f"{DEFAULT_SPEC}.clear", None))

    def kill_switch(self) -> bool:
        """Whether all steering is off."""
        return self.kill_switch_turned()[0]

    def kill_switch_turned(self) -> tuple[bool, Turned | None]:
        """Whether all steering is off, and who turned it last; None where nobody did."""
        with self._database.read() as session:
            row = session.get(Setting, KILL_SWITCH)
            return row is not None and bool(row.value), _turned(session, KILL_SWITCH)

    def set_kill_switch(self, on: bool, turns: Sequence[Turn] = ()) -> None:
        """Store the state. turns: all that led to it, the last one included, which the audit gets; by default one by
        who asks for it in this context."""

        def work(session: Session) -> None:
            row = session.get(Setting, KILL_SWITCH)
            before = row is not None and bool(row.value)
            for turn in turns or [Turn(on, ACTOR.get(), now())]:
                note(session, "kill_switch.set", "kill_switch", before=before, after=turn.on, actor=turn.by, at=turn.at)
                # Whoever turns it to what it is already has not turned it.
                if turn.on != before:
                    _store(session, KILL_SWITCH + TURNED, Turned.of(turn.by, turn.at).to_json())
                before = turn.on
            _store(session, KILL_SWITCH, on)

        self._database.write(work)


def default_refs(session: Session) -> list[Ref]:
    spec = _default_spec(session)
    return [] if spec is None else [ref for _, ref in refs_of(spec)]


def _default_spec(session: Session) -> Spec | None:
    document = _stored_default(session)
    return None if document is None else from_json(document, "the stored default spec")


def _stored_default(session: Session) -> str | None:
    row = session.get(Setting, DEFAULT_SPEC)
    return None if row is None else row.value


def _turned(session: Session, key: str) -> Turned | None:
    row = session.get(Setting, key + TURNED)
    return None if row is None else Turned.from_json(row.value)


def _store_default(session: Session, action: str, document: str | None) -> None:
    before = _stored_default(session)
    _store(session, DEFAULT_SPEC, document)
    _store(session, DEFAULT_SPEC + TURNED, Turned.of(ACTOR.get(), now()).to_json())
    note(session, action, DEFAULT_SPEC, before=None if before is None else json.loads(before),
         after=None if document is None else json.loads(document))


def _store(session: Session, key: str, value: object) -> None:
    row = session.get(Setting, key, with_for_update=True)
    if row is None:
        session.add(Setting(key=key, value=value))
    else:
        row.value = value
