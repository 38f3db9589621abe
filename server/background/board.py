"""Jobs in the database that servers share: who runs which, until when, and the request by which one is begun again.

A server holds its jobs by a lease, which it renews while it lives. A job whose lease is over for `MARGIN_S` is taken by
another one. Leases go by the database's clock, so those of the servers need not agree.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Boolean, Float, Integer, String, Text, delete, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from server.background.job import FINISHED, Job
from vectors.library.beside import Beside, metadata
from vectors.storage_errors import LibraryUnavailable

MIGRATIONS = Path(__file__).parent / "migrations"
# How long a lease holds, and how much longer others leave the job alone, so that who holds it has noticed by then.
LEASE_S, MARGIN_S = 15.0, 5.0
# A job that this many servers died of, or that none could begin, is not begun again.
MOST_ATTEMPTS = 4
KEPT = 500


class Base(DeclarativeBase):
    metadata = metadata()


class Row(Base):
    """until: end of the lease, in seconds since 1970. unwanted: somebody asked to cancel it."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    created: Mapped[float] = mapped_column(Float, index=True)
    document: Mapped[str] = mapped_column(Text)
    request: Mapped[str] = mapped_column(Text)
    owner: Mapped[str] = mapped_column(String(40))
    until: Mapped[float] = mapped_column(Float)
    attempt: Mapped[int] = mapped_column(Integer)
    finished: Mapped[bool] = mapped_column(Boolean)
    unwanted: Mapped[bool] = mapped_column(Boolean)


@dataclass(frozen=True)
class Asked:
    """The request that made a job. who: name, tenant, roles and key of who sent it."""

    method: str
    path: str
    query: str
    body: str
    who: Mapping[str, Any]


@dataclass(frozen=True)
class Beat:
    """What a server learns when it renews its leases: which jobs are no longer its own, and which nobody wants."""

    lost: frozenset[str]
    unwanted: frozenset[str]


class Board:
    """Methods block: call them in a thread. They raise LibraryUnavailable."""

    def __init__(self, url: str) -> None:
        self._beside = Beside(url, "jobs", MIGRATIONS, lambda error: LibraryUnavailable(
            f"the database of jobs cannot be used: {error}"[:400]))
        self._session = self._beside.session

    def close(self) -> None:
        self._beside.close()

    def add(self, job: Job, asked: Asked) -> None:
        with self._session() as session:
            session.add(Row(id=job.id, created=job.created_at, document=_document(job), owner=job.owner, attempt=1,
                            request=json.dumps(asdict(asked)), until=_now(session) + LEASE_S, finished=False,
                            unwanted=False))
            old = select(Row.id).where(Row.finished).order_by(Row.created.desc()).offset(KEPT)
            session.execute(delete(Row).where(Row.id.in_(list(session.scalars(old)))))

    def remove(self, job_id: str, owner: str) -> None:
        """What was added and could not be begun."""
        with self._session() as session:
            session.execute(delete(Row).where(Row.id == job_id, Row.owner == owner))

    def beat(self, owner: str, jobs: Sequence[Job]) -> Beat:
        """Renew the leases of a server, and record how far its jobs are. Those that are over are recorded once."""
        lost, unwanted = set(), set()
        with self._session() as session:
            now = _now(session)
            # In one order, so that no two servers wait for each other.
            rows = {row.id: row for row in session.scalars(
                select(Row).where(Row.id.in_([job.id for job in jobs])).order_by(Row.id).with_for_update())}
            for job in jobs:
                row = rows.get(job.id)
                over = row is not None and row.finished and job.status not in FINISHED
                if row is None or row.owner != owner or over:
                    lost.add(job.id)
                    continue
                row.document, row.until, row.finished = _document(job), now + LEASE_S, job.status in FINISHED
                if row.unwanted:
                    unwanted.add(job.id)
        return Beat(frozenset(lost), frozenset(unwanted))

    def take(self, owner: str) -> tuple[Job, Asked] | None:
        """The oldest job that nobody holds any longer, which `owner` holds from now on."""
        with self._session() as session:
            now = _now(session)
            row = session.scalar(select(Row).where(Row.finished.is_(False), Row.until < now - MARGIN_S)
                                 .order_by(Row.created).limit(1).with_for_update(skip_locked=True))
            if row is None:
                return None
            job = Job.model_validate_json(row.document)
            if row.unwanted or row.attempt >= MOST_ATTEMPTS:
                job.status, job.finished_at = "cancelled" if row.unwanted else "failed", now
                if not row.unwanted:
                    job.error = {"message": f"{row.attempt} servers stopped before the job was done",
                                 "code": "interrupted"}
                row.document, row.finished = _document(job), True
                return None
            row.owner, row.until, row.attempt = owner, now + LEASE_S, row.attempt + 1
            job.owner = owner
            row.document = _document(job)
            return job, Asked(**json.loads(row.request))

    def release(self, owner: str, job_ids: Sequence[str]) -> None:
        """Let others take these jobs now."""
        with self._session() as session:
            for row in session.scalars(select(Row).where(Row.id.in_(job_ids), Row.owner == owner,
                                                         Row.finished.is_(False)).with_for_update()):
                row.until = 0.0

    def cancel(self, job_id: str) -> None:
        """Whoever runs it learns of it with its next beat."""
        with self._session() as session:
            row = session.get(Row, job_id, with_for_update=True)
            if row is not None:
                row.unwanted = True

    def all(self) -> list[Job]:
        with self._session() as session:
            return [Job.model_validate_json(document) for document in
                    session.scalars(select(Row.document).order_by(Row.created.desc()).limit(2 * KEPT))]


def _document(job: Job) -> str:
    # Places are those of this moment.
    return job.model_dump_json(exclude={"place", "behind"})


def _now(session: Session) -> float:
    if session.get_bind().dialect.name == "postgresql":
        return float(session.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0)
    return time.time()

