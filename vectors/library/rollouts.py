"""Roll-outs: a candidate version that is tried on a part of the requests that ask for an alias.

A draft acts on nothing. Published, it acts on requests, step by step. From there it ends in production, where the alias
points at the candidate, or returned, where only the alias's own version acts. The alias itself stays at the stable
version until the end, so to return is to change one row.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from steering.language.errors import Conflict, InvalidRequest, NotFound
from vectors.library import naming
from vectors.library.audit.notes import ACTOR, Actor, note
from vectors.library.database import Database
from vectors.library.listing import relist
from vectors.library.moves import PUBLISHED, running_on
from vectors.library.naming import Ref
from vectors.library.requirements import check_passed
from vectors.library.revision import Memory
from vectors.library.spaces import EVERYTHING, READER, reading
from vectors.library.tables import Collection, Named, RolloutRow, RolloutTally, now
from vectors.storage_errors import LibraryFull

DRAFT, PRODUCTION, RETURNED = "draft", "production", "returned"
# At work at once, because each request looks through them; and kept in all, of which the oldest that ended go.
MOST_PUBLISHED, MOST_KEPT = 32, 1000
MOST_EVENTS = 200
# Who a change is recorded for that the server makes by itself.
ITSELF = Actor(key_name="roll-out")


@dataclass(frozen=True)
class StoredRollout:
    """One roll-out. stable, candidate: numbers of versions. terms: JSON text of what its maker states. history: what
    became of it, oldest first, each with `at`, `what`, `by`, `tenant` and `why`."""

    id: str
    collection: Collection
    name: str
    alias: str
    stable: int
    candidate: int
    status: str
    step: int
    step_since: datetime
    created_at: datetime
    terms: str
    history: tuple[dict[str, Any], ...]

    @property
    def target(self) -> str:
        return f"{self.name}@{self.alias}"

    @property
    def running(self) -> bool:
        return self.status == PUBLISHED

    def by(self, what: str) -> str | None:
        """Who did it last: name and tenant of a key."""
        found = [event for event in self.history if event["what"] == what]
        return f"{found[-1]['tenant']}/{found[-1]['by']}" if found else None


@dataclass(frozen=True)
class Tally:
    """What a guard rail has seen: samples of each arm, rounds of both, and the logarithms of its wealth."""

    stable_count: int = 0
    stable_sum: float = 0.0
    candidate_count: int = 0
    candidate_sum: float = 0.0
    rounds: int = 0
    wealth: tuple[float, ...] = field(default=())

    def plus(self, other: "Tally") -> "Tally":
        """Of both. Wealth of one that has seen nothing is empty."""
        mine, theirs = self.wealth, other.wealth
        both = tuple(a + b for a, b in zip(mine, theirs, strict=True)) if mine and theirs else mine or theirs
        return Tally(self.stable_count + other.stable_count, self.stable_sum + other.stable_sum,
                     self.candidate_count + other.candidate_count, self.candidate_sum + other.candidate_sum,
                     self.rounds + other.rounds, both)


class Rollouts:
    """Methods block: call them in a thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._kept: Memory[list[StoredRollout]] = Memory(database, 1)

    def running(self) -> list[StoredRollout]:
        """Those that act on requests for the model that is served; from memory where the library has not changed."""
        # Whoever asks for a change, the server looks after all of them.
        with reading(EVERYTHING):
            return list(self._kept.get("running", _running))

    def list(self, limit: int = 50) -> list[StoredRollout]:
        """Newest first, of names that the reader may know."""
        with self._database.read() as session:
            return [_stored(row) for row in session.scalars(
                select(RolloutRow).join(Named).where(*READER.get().readable(Named.name))
                .order_by(RolloutRow.created_at.desc(), RolloutRow.id).limit(limit))]

    def find(self, id: str) -> StoredRollout:
        """Raises NotFound."""
        with self._database.read() as session:
            return _stored(_row(session, id))

    def create(self, collection: Collection, name: str, alias: str, candidate: int, terms: Mapping[str, Any]
               ) -> StoredRollout:
        """Make a draft. The stable version is the one that the alias points at.

        Raises:
            NotFound: no such name, alias or version.
            InvalidRequest: the candidate is the stable version.
            LibraryFull: there are as many roll-outs that have not ended as may be kept.
        """
        naming.check_name(name, "target")
        naming.check_alias(alias)
        naming.check_changed(name, "target")

        def work(session: Session) -> StoredRollout:
            version = naming.resolve(session, collection, Ref(name, str(candidate)))
            stable = naming.aliased_number(session, collection, name, alias)
            if stable is None:
                raise NotFound(f"there is no {collection} alias {name}@{alias}", param="target",
                               fix="Point the alias at the version that is in use, then roll the other one out.")
            if stable == candidate:
                raise InvalidRequest(f"{name}@{alias} points at version {candidate} already", param="candidate",
                                     fix="Name another version.")
            _make_room(session)
            row = RolloutRow(id=f"ro-{secrets.token_hex(6)}", named=version.named, alias=alias, stable=stable,
                             candidate=candidate, status=DRAFT, step=0, step_since=now(), created_at=now(),
                             terms=json.dumps(terms, sort_keys=True, allow_nan=False), history=[])
            session.add(row)
            _tell(row, "created")
            session.flush()
            note(session, "rollout.create", row.id, after=_told(row))
            return _stored(row)

        return self._database.write(work)

    def publish(self, id: str, *, two_people: bool = False) -> StoredRollout:
        """Let a draft act on requests, from its first step on.

        Args:
            two_people: whether who publishes it must not be who made it.

        Raises:
            NotFound. EvaluationRequired.
            Conflict: it is no draft, the alias moved meanwhile, another roll-out is at work behind it, or too many
            are at work.
        """

        def work(session: Session) -> StoredRollout:
            row = _row(session, id, lock=True)
            if row.status != DRAFT:
                raise Conflict(f"the roll-out {id} is not a draft, its status is {row.status}", param="id")
            made, who = row.history[0], ACTOR.get()
            if two_people and (made["key_id"], made["by"]) == (who.key_id, who.key_name):
                raise Conflict("a roll-out is published with another key than the one that made it", param="id",
                               fix="Have somebody else publish it.")
            collection, name = row.named.collection, row.named.name
            # The name is held, so that of two that are published at once one sees the other.
            naming.find_name(session, collection, name, lock=True)
            if naming.aliased_number(session, collection, name, row.alias) != row.stable:
                raise Conflict(f"{name}@{row.alias} does not point at version {row.stable} any more", param="id",
                               fix="Make another roll-out.")
            check_passed(session, naming.resolve(session, collection, Ref(name, str(row.candidate))), row.alias)
            for other in running_on(session, row.named_id, row.alias):
                raise Conflict(f"the roll-out {other.id} is at work behind {name}@{row.alias}", param="id",
                               fix="Promote or return that one first.")
            if _count(session, PUBLISHED) >= MOST_PUBLISHED:
                raise Conflict(f"{MOST_PUBLISHED} roll-outs are at work already", param="id",
                               fix="Promote or return one of them first.")
            return _turned(session, row, PUBLISHED, "published")

        return self._database.write(work)

    def advance(self, id: str, step: int) -> StoredRollout:
        """Go from `step` to the next one, unless another server did so already."""

        def work(session: Session) -> StoredRollout:
            row = _row(session, id, lock=True)
            if row.status != PUBLISHED or row.step != step:
                return _stored(row)
            row.step, row.step_since = step + 1, now()
            _tell(row, f"step {step + 1}", actor=ITSELF)
            note(session, "rollout.step", id, before={"step": step}, after={"step": step + 1}, actor=ITSELF)
            return _stored(row)

        return self._database.write(work)

    def promote(self, id: str, *, actor: Actor | None = None) -> StoredRollout:
        """Point the alias at the candidate, which ends the roll-out. actor: by default who asks in this context.

        Raises:
            NotFound. EvaluationRequired. Conflict: it is not at work.
        """

        def work(session: Session) -> StoredRollout:
            row = _row(session, id, lock=True)
            _check_running(row)
            target = f"{row.named.name}@{row.alias}"
            moved = naming.set_alias(session, row.named.collection, row.named.name, row.alias, row.candidate)
            check_passed(session, moved, row.alias)
            relist(session, moved.named)
            note(session, f"{row.named.collection}.alias", target, before=row.stable, after=row.candidate, actor=actor)
            return _turned(session, row, PRODUCTION, "promoted", actor=actor)

        return self._database.write(work)

    def give_back(self, id: str, why: str, *, actor: Actor | None = None) -> StoredRollout:
        """End the roll-out: only the stable version acts again. One that has ended already stays as it is.

        Raises:
            NotFound. Conflict: it is a draft.
        """

        def work(session: Session) -> StoredRollout:
            row = _row(session, id, lock=True)
            if row.status == DRAFT:
                raise Conflict(f"the roll-out {id} is a draft and acts on nothing", param="id", fix="Delete it.")
            return _stored(row) if row.status != PUBLISHED else _turned(
                session, row, RETURNED, "returned", why=why, actor=actor)

        return self._database.write(work)

    def delete(self, id: str) -> None:
        """Raises NotFound. Conflict: it is at work."""

        def work(session: Session) -> None:
            row = _row(session, id, lock=True)
            if row.status == PUBLISHED:
                raise Conflict(f"the roll-out {id} is at work", param="id", fix="Promote or return it first.")
            note(session, "rollout.delete", id, before=_told(row))
            session.delete(row)

        self._database.write(work)

    def tallies(self, ids: Sequence[str]) -> dict[str, dict[int, Tally]]:
        """What guard rails have seen, by roll-out and number of the rail."""
        with self._database.read() as session:
            found: dict[str, dict[int, Tally]] = {}
            for row in session.scalars(select(RolloutTally).where(RolloutTally.rollout_id.in_(ids))):
                found.setdefault(row.rollout_id, {})[row.rail] = _tally(row)
            return found

    def add(self, seen: Mapping[tuple[str, int], Tally]) -> None:
        """Add what a server has seen since it last did, by roll-out and rail. What ended meanwhile is left as it is."""

        def work(session: Session) -> None:
            known = set(session.scalars(select(RolloutRow.id).where(
                RolloutRow.id.in_({id for id, _ in seen}), RolloutRow.status == PUBLISHED).with_for_update()))
            for (id, rail), more in sorted(seen.items()):
                if id not in known:
                    continue
                row = session.get(RolloutTally, (id, rail))
                total = (Tally() if row is None else _tally(row)).plus(more)
                if row is None:
                    row = RolloutTally(rollout_id=id, rail=rail)
                    session.add(row)
                for name, value in vars(total).items():
                    setattr(row, name, list(value) if name == "wealth" else value)

        self._database.count(work)


def _running(session: Session) -> list[StoredRollout]:
    rows = session.scalars(select(RolloutRow).where(RolloutRow.status == PUBLISHED).order_by(RolloutRow.created_at))
    return [_stored(row) for row in rows if _meant(session, row)]


def _meant(session: Session, row: RolloutRow) -> bool:
    """Whether the name means this one to the model that is served."""
    named = naming.find_name(session, row.named.collection, row.named.name)
    return named is not None and named.id == row.named_id


def _make_room(session: Session) -> None:
    """The oldest that ended go. Raises LibraryFull: none of those that are kept has."""
    over = (session.scalar(select(func.count()).select_from(RolloutRow)) or 0) - MOST_KEPT + 1
    if over <= 0:
        return
    ended = session.scalars(select(RolloutRow.id).where(RolloutRow.status.in_((PRODUCTION, RETURNED)))
                            .order_by(RolloutRow.created_at).limit(over)).all()
    if len(ended) < over:
        raise LibraryFull(f"there are {MOST_KEPT} roll-outs that have not ended", fix="Delete drafts.")
    session.execute(delete(RolloutTally).where(RolloutTally.rollout_id.in_(ended)))
    session.execute(delete(RolloutRow).where(RolloutRow.id.in_(ended)))


def _count(session: Session, status: str) -> int:
    return session.scalar(select(func.count()).select_from(RolloutRow).where(RolloutRow.status == status)) or 0


def _check_running(row: RolloutRow) -> None:
    if row.status != PUBLISHED:
        raise Conflict(f"the roll-out {row.id} is not at work, its status is {row.status}", param="id")


def _turned(session: Session, row: RolloutRow, status: str, what: str, *, why: str = "", actor: Actor | None = None
            ) -> StoredRollout:
    before, row.status, row.step_since = row.status, status, now()
    _tell(row, what, why=why, actor=actor)
    note(session, f"rollout.{what}", row.id, before={"status": before}, actor=actor,
         after={"status": status, "target": f"{row.named.name}@{row.alias}", "candidate": row.candidate, "why": why})
    session.flush()
    return _stored(row)


def _tell(row: RolloutRow, what: str, *, why: str = "", actor: Actor | None = None) -> None:
    who = actor or ACTOR.get()
    event = {"at": now().isoformat(), "what": what, "by": who.key_name, "tenant": who.tenant, "key_id": who.key_id,
             "why": why[:500]}
    row.history = [*row.history[:MOST_EVENTS - 1], event]


def _told(row: RolloutRow) -> dict[str, Any]:
    """What the audit says of it."""
    return {"target": f"{row.named.name}@{row.alias}", "collection": row.named.collection, "stable": row.stable,
            "candidate": row.candidate, "status": row.status, "terms": json.loads(row.terms)}


def _row(session: Session, id: str, *, lock: bool = False) -> RolloutRow:
    """A row that is locked is to be changed."""
    row = session.get(RolloutRow, id, with_for_update={"of": RolloutRow} if lock else None)
    if row is None or not READER.get().reads(row.named.name):
        raise NotFound(f"there is no roll-out {id[:40]!r}", param="id")
    if lock:
        READER.get().check_writes(row.named.name, "id")
    return row


def _stored(row: RolloutRow) -> StoredRollout:
    return StoredRollout(row.id, row.named.collection, row.named.name, row.alias, row.stable, row.candidate, row.status,
                         row.step, row.step_since, row.created_at, row.terms, tuple(row.history))


def _tally(row: RolloutTally) -> Tally:
    return Tally(row.stable_count, row.stable_sum, row.candidate_count, row.candidate_sum, row.rounds,
                 tuple(row.wealth))
