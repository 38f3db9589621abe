"""The audit as it is read, added to and shortened."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from vectors.library.audit.chain import BEGINNING, EXPIRED, Record, Verdict, verify
from vectors.library.audit.notes import LOCAL, Actor, Note, note
from vectors.library.database import Database
from vectors.library.tables import AuditRow

AT_ONCE = 500


@dataclass(frozen=True)
class Wanted:
    """Which records: those for which all that is given holds. action: the whole of it, or its begin, `preset` say.
    after, before: record numbers; with `after` the oldest come first, else the newest."""

    after: int | None = None
    before: int | None = None
    action: str | None = None
    target: str | None = None
    tenant: str | None = None
    key_id: str | None = None
    request_id: str | None = None
    since: datetime | None = None
    limit: int = 100


class AuditLog:
    """Methods block: call them in a thread. They raise LibraryUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, action: str, target: str, *, before: Any = None, after: Any = None, actor: Actor | None = None
            ) -> None:
        """Record what lies outside of the library's database."""
        self._database.write(lambda session: note(session, action, target, before=before, after=after, actor=actor))

    def add_all(self, notes: Sequence[Note]) -> None:
        """Record what was done with the library and changed nothing of it, so what is remembered of it stays true."""

        def work(session: Session) -> None:
            for one in notes:
                note(session, one.action, one.target, before=one.before, after=one.after, actor=one.actor, at=one.at)

        self._database.write(work, changes=False)

    def list(self, wanted: Wanted) -> list[Record]:
        statement = select(AuditRow).limit(wanted.limit)
        if wanted.after is not None:
            statement = statement.where(AuditRow.number > wanted.after).order_by(AuditRow.number)
        else:
            statement = statement.order_by(AuditRow.number.desc())
        if wanted.before is not None:
            statement = statement.where(AuditRow.number < wanted.before)
        if wanted.action is not None:
            statement = statement.where((AuditRow.action == wanted.action)
                                        | AuditRow.action.startswith(f"{wanted.action}.", autoescape=True))
        for column in ("target", "tenant", "key_id", "request_id"):
            if (value := getattr(wanted, column)) is not None:
                statement = statement.where(getattr(AuditRow, column) == value)
        if wanted.since is not None:
            statement = statement.where(AuditRow.at >= wanted.since)
        with self._database.read() as session:
            return [_record(row) for row in session.scalars(statement)]

    def head(self) -> tuple[int, str]:
        """Number and digest of the newest record; 0 where there is none."""
        found = self.list(Wanted(limit=1))
        return (found[0].number, found[0].digest) if found else (0, BEGINNING)

    def verify(self, known: tuple[int, str] | None = None) -> Verdict:
        """Check the whole chain; see `vectors.library.audit.chain.verify`."""
        return verify(self._all(), known=known)

    def expire(self, older_than: datetime) -> int:
        """Remove the oldest records, and record that; how many they were. The newest record always stays."""

        def work(session: Session) -> int:
            # The first of those that stay ends the run of old ones, as records are removed from the begin only.
            stays = session.scalar(select(AuditRow.number).where(AuditRow.at >= older_than)
                                   .order_by(AuditRow.number).limit(1))
            last = session.scalar(select(AuditRow.number).order_by(AuditRow.number.desc()).limit(1))
            first = session.scalar(select(AuditRow.number).order_by(AuditRow.number).limit(1))
            upto = min(stays if stays is not None else last or 0, last or 0) - 1
            if first is None or upto < first:
                return 0
            digest = session.get_one(AuditRow, upto).digest
            session.execute(delete(AuditRow).where(AuditRow.number <= upto))
            note(session, EXPIRED, f"{first}-{upto}", after={"first": first, "last": upto, "digest": digest},
                 actor=LOCAL)
            return upto - first + 1

        return self._database.write(work)

    def _all(self) -> Iterator[Record]:
        """All records of one snapshot, oldest first."""
        statement = select(AuditRow).order_by(AuditRow.number).execution_options(yield_per=AT_ONCE)
        # Who finds a fault reads no further, and the database is to drop the rest.
        with self._database.read() as session, closing(session.scalars(statement)) as rows:
            for row in rows:
                yield _record(row)


def _record(row: AuditRow) -> Record:
    return Record(row.number, row.at, row.action, row.target, _read(row.before), _read(row.after), row.key_id,
                  row.key_name, row.tenant, row.address, row.request_id, row.previous, row.digest)


def _read(text: str | None) -> Any:
    return None if text is None else json.loads(text)
