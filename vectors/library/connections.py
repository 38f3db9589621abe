"""Connections to a database: a pool of them, and a bound on every wait, so that a database that hangs holds nobody for
ever.

A connection that was lost is replaced when it is next taken from the pool. What was under way on it fails.
"""

from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import OperationalError

CONNECTIONS = 10
# A statement takes milliseconds; one that takes this long waits for something that will not come.
STATEMENT_S = 60.0
# Time without an answer after which a connection to another machine counts as lost.
SILENCE_S = 15
SQLITE = "sqlite"
# Plain URLs of PostgreSQL mean the driver that the extra `postgresql` installs.
DRIVER = "postgresql+psycopg"


def parsed(url: str) -> URL:
    """Raises ArgumentError."""
    found = make_url(url)
    return found.set(drivername=DRIVER) if found.drivername in ("postgresql", "postgres") else found


def connected(url: URL, *, wait_s: float, connections: int = CONNECTIONS, schema: str | None = None,
              **options: Any) -> Engine:
    """A pool of connections; none is opened yet.

    Args:
        wait_s: the longest wait for a connection, for the database to answer the call, and for a lock.
        connections: how many may be open at once.
        schema: of PostgreSQL, in which tables are looked for and made.
    """
    if url.get_backend_name() == SQLITE:
        return create_engine(url, **options)
    options = {"pool_pre_ping": True, "pool_size": connections, "max_overflow": 0, "pool_timeout": wait_s} | options
    if url.drivername != DRIVER:
        return create_engine(url, **options)
    engine = create_engine(url, connect_args={
        "connect_timeout": max(2, round(wait_s)), "application_name": "trimtab", "keepalives_idle": SILENCE_S // 3,
        "keepalives_interval": SILENCE_S // 3, "keepalives_count": 2, "tcp_user_timeout": SILENCE_S * 1000}, **options)
    settings = {"lock_timeout": f"{round(wait_s * 1000)}ms",
                "statement_timeout": f"{round(max(wait_s, STATEMENT_S) * 1000)}ms",
                "idle_in_transaction_session_timeout": f"{round(max(wait_s, STATEMENT_S) * 1000)}ms",
                **({} if schema is None else {"search_path": schema})}

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: object) -> None:
        # Outside of a transaction, whose end would take them back.
        connection.autocommit = True
        connection.execute("; ".join(f"SET {name} = '{value}'" for name, value in settings.items()))
        connection.autocommit = False

    return engine


def lost(error: BaseException) -> bool:
    """Whether a database that is a program of its own cannot be reached, or no longer. Of an error that it reports
    itself, the first two characters of the state say what it is about; 08 and 57 are connections and a server that goes
    away. What the driver says of it names the machine."""
    if not isinstance(error, OperationalError) or not hasattr(error.orig, "sqlstate"):
        return False
    state: str | None = getattr(error.orig, "sqlstate", None)
    return error.connection_invalidated or state is None or state[:2] in ("08", "57")


def without_time_limit(connection: Connection) -> None:
    """In this transaction, statements and waits for locks may take as long as they need."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0"))
