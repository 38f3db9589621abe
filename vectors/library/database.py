"""The database: connections, transactions, migrations."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, ExceptionContext, event, text
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateSchema
from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential

from steering.language.errors import Conflict, InvalidRequest, TrimtabError
from vectors.library.audit.notes import Writing, check_noted, seal
from vectors.library.connections import CONNECTIONS, SQLITE, connected, lost, parsed, without_time_limit
from vectors.library.listening import Listening
from vectors.library.revision import Revision, held, raised, revision_of
from vectors.storage_errors import LibraryUnavailable, StorageFull

Result = TypeVar("Result")

MIGRATIONS = Path(__file__).parent / "migrations"
LOCK_WAIT_S = 30.0
# When a request that met a database out of reach may try again.
RETRY_AFTER_S = 2
# States of SQL by which a server says that two writers met: unique, serialisation, deadlock.
CONFLICTS = {"23505", "40001", "40P01"}
# Serialises migrations of processes that open the same PostgreSQL database at once.
ADVISORY_LOCK = 0x7472696D

# Where a session says which model is served.
MODEL = "model"

# alembic keeps its running environment in module globals.
_migrating = threading.Lock()


class Database:
    """One database, migrated to the newest schema. SQLite files and any other database SQLAlchemy speaks."""

    def __init__(self, url: str, wait_s: float = LOCK_WAIT_S, connections: int = CONNECTIONS) -> None:
        """
        Args:
            wait_s: how long to wait for a lock that another writer holds, and for a connection.
            connections: how many may be open at once, on a database that is a program of its own.

        Raises:
            LibraryUnavailable: the URL is wrong, the database is out of reach or newer than this code.
        """
        self._wait_s = wait_s
        self._listening: Listening | None = None
        # Fingerprint of the model whose names come first; "" where none is served.
        self.model = ""
        try:
            found = parsed(url)
            self._sqlite = found.get_backend_name() == SQLITE
            if self._sqlite and (not found.database or ":memory:" in found.database or "mode=memory" in url):
                raise LibraryUnavailable("a SQLite database in memory is another one for each thread",
                                         fix="Use a file: sqlite:///library.db.")
            if self._sqlite and found.database:
                Path(found.database).absolute().parent.mkdir(parents=True, exist_ok=True)
            self.engine = connected(found, wait_s=wait_s, connections=connections,
                                    json_serializer=partial(json.dumps, allow_nan=False))
        except (ArgumentError, NoSuchModuleError, ImportError, OSError) as error:
            driver = "Install the driver of the database: pip install 'trimtab[postgresql]', or another one."
            raise LibraryUnavailable(f"cannot open the library database: {error}",
                                     fix=driver if isinstance(error, ImportError) else None) from error
        # SQLite reads from one snapshot by nature, others must be told to.
        self._reader = self.engine
        if self._sqlite:
            _tune_sqlite(self.engine, wait_s)
            renew_read_only(self.engine)
        else:
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ")
        self.revision = Revision(lambda: self.snapshot(revision_of), partial(_trace, found.database)
                                 if self._sqlite and found.database else lambda: None)
        retrying = Retrying(retry=retry_if_exception(_is_conflict), wait=wait_random_exponential(0.05, max=1.0),
                            stop=stop_after_delay(wait_s), reraise=True)
        with ExitStack() as failed, _typed(opening=True):
            failed.callback(self.close)
            retrying(self._migrate)
            failed.pop_all()

    def close(self) -> None:
        if self._listening is not None:
            self._listening.stop()
            self._listening = None
        self.engine.dispose()

    def follow(self, changed: Callable[[], None]) -> None:
        """Call `changed`, from another thread, after a change of any process, where the database tells of them. Others
        are known within `vectors.library.revision.FRESH_S` of being asked for."""

        def told(number: int | None) -> None:
            if number is None:
                self.revision.expire()
            else:
                self.revision.wrote(number)
            changed()

        if self.engine.dialect.name == "postgresql" and self._listening is None:
            self._listening = Listening(self.engine, told)
            self._listening.start()

    @property
    def followed(self) -> bool | None:
        """Whether changes are told at present; None where the database does not tell of them."""
        return None if self._listening is None else self._listening.connected

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent snapshot."""
        with _typed(), Session(self._reader, info={MODEL: self.model}) as session:
            yield session

    def snapshot(self, work: Callable[[Session], Result]) -> Result:
        """What `work` reads of a consistent snapshot."""
        with self.read() as session:
            return work(session)

    def write(self, work: Callable[[Session], Result], *, audited: bool = True, changes: bool = True) -> Result:
        """Run `work` in a transaction and commit. On SQLite writers take turns from its start on.

        `work` runs again where two writers met; it must change nothing but the database. audited: whether it has to
        note what it changes (`vectors.library.audit.notes.note`); what changes rows without a note is rolled back.
        changes: False for what only notes, because what others remember of the library stays true then.
        """
        retrying = Retrying(retry=retry_if_exception(_is_conflict), wait=wait_random_exponential(0.01, max=1.0),
                            stop=stop_after_attempt(12) | stop_after_delay(self._wait_s), reraise=True)
        try:
            with _typed():
                result: Result
                result, number = retrying(self._once, work, audited, changes)
        except IntegrityError as error:
            raise Conflict("the library was changed by somebody else at the same time", fix="Try again.") from error
        self.revision.wrote(number)
        return result

    def count(self, work: Callable[[Session], Result]) -> Result:
        """Run `work`, which adds to counts, in a transaction and commit. What others remember of the library stays
        true, so the revision is not raised, and nothing of it is audited."""

        def attempt() -> Result:
            with self._writer() as connection, Session(connection) as session, session.begin():
                return work(session)

        with _typed():
            return Retrying(retry=retry_if_exception(_is_conflict), wait=wait_random_exponential(0.01, max=1.0),
                            stop=stop_after_attempt(12) | stop_after_delay(self._wait_s), reraise=True)(attempt)

    def _once(self, work: Callable[[Session], Result], audited: bool, changes: bool) -> tuple[Result, int]:
        try:
            return self._attempt(work, audited, changes)
        except DBAPIError as error:
            if not _is_read_only(error):
                raise
            # Nothing was written. The disk may be writable again by now, and only a new connection would notice it.
            return self._attempt(work, audited, changes)

    def _attempt(self, work: Callable[[Session], Result], audited: bool, changes: bool) -> tuple[Result, int]:
        with (self._writer() as connection,
              Writing(connection, expire_on_commit=False, info={MODEL: self.model}) as session, session.begin()):
            result = work(session)
            if audited:
                check_noted(session)
            number = raised(session) if changes else held(session)
            seal(session)
            return result, number

    def _writer(self) -> Connection:
        return self.engine.connect().execution_options(write=True)

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """A transaction in which tables may be changed that others refer to: on SQLite they are made anew for that,
        which is allowed only where nobody looks after references. To say so has no effect within a transaction."""
        with self._writer() as connection:
            if self._sqlite:
                _pragma(connection, "foreign_keys=OFF")
            try:
                with connection.begin():
                    yield connection
            finally:
                if self._sqlite:
                    _pragma(connection, "foreign_keys=ON")

    def _migrate(self) -> None:
        with self.migrating() as connection:
            migrate(connection, MIGRATIONS)


def _pragma(connection: Connection, text: str) -> None:
    driver: Any = connection.connection.driver_connection
    driver.execute(f"PRAGMA {text}").close()


def migrate(connection: Connection, migrations: Path, *, found: str | None = None) -> None:
    """Bring a database to the newest of the schemas in the folder `migrations`, inside the caller's transaction.

    found: the schema it has, where it has one and no migration ever recorded it.

    Raises:
        LibraryUnavailable: a newer version of the software wrote it.
    """
    _alone(connection)
    config = alembic_config(connection, migrations)
    newest = ScriptDirectory.from_config(config).get_current_head()
    if MigrationContext.configure(connection).get_current_revision() == newest:
        return
    try:
        with _migrating:
            if found is not None:
                command.stamp(config, found)
            command.upgrade(config, "head")
    except CommandError as error:
        raise LibraryUnavailable(f"the database cannot be brought to this version: {error}",
                                 fix="It may have been written by a newer version: use that one.") from error


def make_schema(connection: Connection, name: str) -> None:
    """Where the database has schemas."""
    if connection.dialect.name == "postgresql":
        _alone(connection)
        connection.execute(CreateSchema(name, if_not_exists=True))


def _alone(connection: Connection) -> None:
    """For the rest of the transaction no other process changes the tables of this database."""
    without_time_limit(connection)
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})


def alembic_config(connection: Connection, migrations: Path = MIGRATIONS) -> Config:
    """Configuration of alembic that works on `connection`, wherever the package is installed."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("version_locations", str(migrations / "versions").replace("%", "%%"))
    # A path may hold spaces and colons, which the other separators would split at.
    config.set_main_option("path_separator", "newline")
    config.attributes["connection"] = connection
    return config


def _trace(path: str) -> tuple[tuple[int, int] | None, ...]:
    """Age and size of the files of a SQLite database, which every change of it changes."""
    found: list[tuple[int, int] | None] = []
    for file in (f"{path}-wal", path):
        try:
            status = os.stat(file)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_mtime_ns, status.st_size))
    return tuple(found)


@contextmanager
def _typed(*, opening: bool = False) -> Iterator[None]:
    """Raise LibraryUnavailable or StorageFull for whatever a database may fail with. Conflicts of writers stay what
    they are. opening: whoever gets the error may know where the database is."""
    try:
        yield
    except IntegrityError:
        raise
    except DataError as error:
        raise InvalidRequest(f"the library database does not take a value: {error.orig}"[:300]) from error
    except (DBAPIError, PoolTimeout) as error:
        raise _unavailable(error, opening) from error


def _unavailable(error: SQLAlchemyError, opening: bool) -> TrimtabError:
    if not opening and lost(error):
        # What the driver says names the machine.
        return LibraryUnavailable("the library database is out of reach", retry_after_s=RETRY_AFTER_S)
    complaint = str(error.orig if isinstance(error, DBAPIError) else error)
    if any(sign in complaint.lower() for sign in ("disk is full", "no space left", "disk quota")):
        return StorageFull(f"the library database cannot be written: {complaint}"[:300],
                           fix="Make room on the database's disk.")
    # SQLite raises the base class itself for a file that is no database.
    damaged = type(error) is DatabaseError or "malformed" in complaint
    return LibraryUnavailable(f"the library database {'is damaged' if damaged else 'cannot be used'}: "
                              f"{complaint}"[:300], fix="Restore it from a backup." if damaged else None)


def _tune_sqlite(engine: Engine, wait_s: float) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: object) -> None:
        # Transactions are begun by the handler below: the driver's own begin comes too late for a write lock.
        connection.isolation_level = None
        for pragma in (f"busy_timeout={int(wait_s * 1000)}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that begins with a read fails at once when it comes to write, and does not wait for the lock. So
        # writers ask for the lock first.
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def renew_read_only(engine: Engine) -> None:
    """Replace the connections of a pool when one of them may only read. SQLite opens a file that cannot be written at
    the time for reading alone, and such a connection would stay so for as long as it is kept."""

    @event.listens_for(engine, "handle_error")
    def handle(context: ExceptionContext) -> None:
        if not _is_read_only(context.original_exception):
            return
        context.is_disconnect = True
        # Closing it gives up a lock only when its statements are gone, which the error keeps for a while.
        raw = None if context.connection is None else context.connection.connection.dbapi_connection
        if raw is not None:
            raw.rollback()


def _is_read_only(error: BaseException) -> bool:
    return "readonly database" in str(error).lower()


def _is_conflict(error: BaseException) -> bool:
    """Whether two writers met and the transaction is worth another try."""
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return state in CONFLICTS
    complaint = str(error.orig).lower()
    return any(sign in complaint for sign in ("unique", "locked", "serialize", "deadlock"))
