"""A database beside the library: it may be lost without harm, and a lock on it must not touch the library."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, MetaData
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from steering.language.errors import TrimtabError
from vectors.library.connections import SQLITE, connected, lost, parsed
from vectors.library.database import RETRY_AFTER_S, make_schema, migrate, renew_read_only
from vectors.storage_errors import LibraryUnavailable

# Of a database that is a program of its own: the longest wait for it, and how many connections to it.
CONNECT_S, FEW = 5.0, 3
NAMING = {"ix": "ix_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s"}


def metadata() -> MetaData:
    """Of the tables of such a database, whose indices and keys have the names that their migrations give them."""
    return MetaData(naming_convention=NAMING)


class Beside:
    """Opened, and migrated, when it is first used: a database out of reach must not keep the server from starting.

    Args:
        name: of the schema that holds its tables, where the database is PostgreSQL, so that several such databases, and
            the library, may be one.
        migrations: the folder that holds `versions`.
        refusal: the error to raise for whatever the database complains about.
        lock_wait_s: the longest wait for a lock of SQLite's.
        found: the revision of a database that has tables and no record of a migration.
    """

    def __init__(self, url: str, name: str, migrations: Path, refusal: Callable[[Exception], TrimtabError], *,
                 lock_wait_s: float = 1, found: Callable[[Connection], str | None] = lambda connection: None) -> None:
        at = parsed(url)
        waits = {"connect_args": {"timeout": lock_wait_s}} if at.get_backend_name() == SQLITE else {}
        self._schema = f"trimtab_{name}"
        self.engine = connected(at, wait_s=CONNECT_S, connections=FEW, schema=self._schema, **waits)
        renew_read_only(self.engine)
        self._migrations, self._refusal, self._found = migrations, refusal, found
        self._ready = False
        self._opening = threading.Lock()

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction, which is committed at the end of the block."""
        try:
            with self._opening:
                if not self._ready:
                    with self.engine.begin() as connection:
                        make_schema(connection, self._schema)
                        migrate(connection, self._migrations, found=self._found(connection))
                    self._ready = True
            with Session(self.engine) as session, session.begin():
                yield session
        except (SQLAlchemyError, OSError, LibraryUnavailable) as error:
            away = lost(error)
            refused = self._refusal(ConnectionError("it is out of reach") if away else error)
            refused.retry_after_s = RETRY_AFTER_S if away else refused.retry_after_s
            raise refused from error
