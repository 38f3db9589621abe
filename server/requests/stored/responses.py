"""Responses in a database of their own, for a bounded time and within a bound of bytes.

They are what people wrote and were answered. So they do not lie in the library, which is backed up and copied, and they
go when their time is over.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Float, Integer, String, Text, delete, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from steering.language.errors import NotFound
from vectors.library.audit.notes import maker
from vectors.library.beside import Beside, metadata
from vectors.library.spaces import READER
from vectors.storage_errors import LibraryUnavailable

MIGRATIONS = Path(__file__).parent / "migrations"


class Base(DeclarativeBase):
    metadata = metadata()


class Row(Base):
    __tablename__ = "responses"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    expires: Mapped[float] = mapped_column(Float, index=True)
    tenant: Mapped[str] = mapped_column(String(64), server_default="default")
    nbytes: Mapped[int] = mapped_column(Integer)
    response: Mapped[str] = mapped_column(Text)
    messages: Mapped[str] = mapped_column(Text)


@dataclass(frozen=True)
class Stored:
    """response: as it was answered. messages: the conversation up to its end, as messages of a chat."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]


class StoredResponses:
    """Opened, and migrated, when it is first used. Methods block: call them in a thread."""

    def __init__(self, url: str, *, seconds: float, most_bytes: int, now: Callable[[], float] = time.time) -> None:
        self._seconds, self._most_bytes, self._now = seconds, most_bytes, now
        self._beside = Beside(url, "responses", MIGRATIONS, lambda error: LibraryUnavailable(
            f"the database of responses cannot be used: {error}"[:400]), lock_wait_s=5)
        self._session = self._beside.session

    def close(self) -> None:
        self._beside.close()

    def keep(self, response_id: str, stored: Stored) -> bool:
        """False where it is larger than everything that may be kept. The oldest make room.

        Raises:
            LibraryUnavailable: the database cannot be used.
        """
        response, messages = json.dumps(stored.response), json.dumps(stored.messages)
        nbytes = len(response.encode()) + len(messages.encode())
        if nbytes > self._most_bytes or not self._seconds:
            return False
        with self._session() as session:
            session.execute(delete(Row).where(Row.expires <= self._now()))
            held = session.scalar(select(func.coalesce(func.sum(Row.nbytes), 0))) or 0
            for row in session.scalars(select(Row).order_by(Row.expires)) if held + nbytes > self._most_bytes else ():
                held -= row.nbytes
                session.delete(row)
                if held + nbytes <= self._most_bytes:
                    break
            session.add(Row(id=response_id, expires=self._now() + self._seconds, tenant=maker(), nbytes=nbytes,
                            response=response, messages=messages))
        return True

    def find(self, response_id: str, param: str) -> Stored:
        """Raises NotFound about the field `param`: it is not here, or is another tenant's. LibraryUnavailable."""
        with self._session() as session:
            row = session.get(Row, response_id)
            if row is None or row.expires <= self._now() or not READER.get().sees(row.tenant):
                raise NotFound(f"there is no response {response_id[:64]!r} here", param=param,
                               fix="It was not stored, was deleted, or its time is over.")
            return Stored(json.loads(row.response), json.loads(row.messages))

    def delete(self, response_id: str, param: str) -> None:
        """Raises NotFound about the field `param`, LibraryUnavailable."""
        self.find(response_id, param)
        with self._session() as session:
            session.execute(delete(Row).where(Row.id == response_id))
