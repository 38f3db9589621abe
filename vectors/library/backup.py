"""Copies of a library: taken while servers use it, and put into an empty one, on the same kind of database or another.

The rows are those of one moment. Numbers never change, so they are copied afterwards; where a collection took some of
them meanwhile, because their versions were deleted, the rows of a later moment are taken.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Column, Connection, DateTime, MetaData, Table, func, insert, select, text

from steering.language.errors import Conflict, InvalidRequest
from vectors.library.archive import Reading, written
from vectors.library.audit.notes import note
from vectors.library.blobs import BlobStore
from vectors.library.database import Database, alembic_config
from vectors.storage_errors import CorruptBlob

# Of the tools that migrate, and of no interest to a copy.
NOT_COPIED = {"alembic_version", "revision"}
MOMENTS = 5
AT_ONCE = 500


@dataclass(frozen=True)
class Copied:
    """rows: of all tables. nbytes: of the numbers."""

    rows: int
    blobs: int
    nbytes: int


def back_up(database: Database, blobs: BlobStore, path: Path) -> Copied:
    """Write the library into a file, which is there once it is whole.

    Raises:
        LibraryUnavailable, StorageUnavailable, StorageFull.
        CorruptBlob: numbers of the library are missing or damaged.
    """
    nbytes = 0
    with written(path) as archive:
        for moment in range(MOMENTS):
            revision, tables, wanted = _moment(database)
            try:
                for digest in wanted:
                    if digest not in archive.blobs:
                        data = blobs.get(digest)
                        archive.blob(digest, data)
                        nbytes += len(data)
            except CorruptBlob:
                if moment == MOMENTS - 1 or _moment(database)[2] == wanted:
                    raise
                continue
            break
        archive.finish(revision, tables, wanted)
    return _recorded(database, "library.backup", path, Copied(
        sum(rows.count("\n") for rows in tables.values()), len(archive.blobs), nbytes))


def restore(database: Database, blobs: BlobStore, path: Path) -> Copied:
    """Put a backup into a library that holds nothing.

    Raises:
        Conflict: there is something in the library.
        InvalidRequest: the file is no backup, or of a newer version.
        CorruptBlob: something in it is missing or damaged; the library is empty then.
        LibraryUnavailable, StorageUnavailable, StorageFull.
    """
    with Reading.open(path) as archive:
        _check_empty(database)
        nbytes = 0
        for digest in archive.contents.blobs:
            data = archive.blob(digest)
            blobs.put(data)
            nbytes += len(data)
        tables = {name: archive.rows(name) for name in archive.contents.tables}
        with database.migrating() as connection:
            _fill(connection, archive.contents.revision, tables)
    database.revision.expire()
    return _recorded(database, "library.restore", path, Copied(
        sum(len(rows) for rows in tables.values()), len(archive.contents.blobs), nbytes))


def _recorded(database: Database, action: str, path: Path, copied: Copied) -> Copied:
    database.write(lambda session: note(session, action, path.name, after=vars(copied)))
    return copied


def _moment(database: Database) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """The revision of the schema, the rows of each table as JSON lines, and the digests of the numbers they name, all
    of one snapshot."""
    with database.read() as session:
        connection = session.connection()
        revision = MigrationContext.configure(connection).get_current_revision() or ""
        found = _tables(connection)
        tables = {name: "".join(json.dumps({column: _plain(value) for column, value in row.items()}) + "\n"
                                for row in connection.execute(select(table)).mappings())
                  for name, table in found.items()}
        named = connection.scalars(select(found["artifact"].c.blob).distinct()).all()
    return revision, tables, tuple(sorted(named))


def _tables(connection: Connection) -> dict[str, Table]:
    """As they are in the database, whatever version of the code made them; those that others refer to come first."""
    metadata = MetaData()
    metadata.reflect(connection)
    for table in metadata.sorted_tables:
        for column in table.columns:
            # JSON has a null of its own, which stands where the table allows no other.
            if isinstance(column.type, JSON):
                column.type = JSON(none_as_null=bool(column.nullable))
    return {table.name: table for table in metadata.sorted_tables if table.name not in NOT_COPIED}


def _check_empty(database: Database) -> None:
    with database.read() as session:
        connection = session.connection()
        for name, table in _tables(connection).items():
            # A row that is only ever locked is no content.
            content = [] if name != "setting" else [table.c.key != "blobs"]
            if connection.scalar(select(func.count()).select_from(table).where(*content)):
                raise Conflict(f"the library holds something already: {name}", param="file",
                               fix="Restore into a new database, and a new store of blobs or the same.")


def _fill(connection: Connection, revision: str, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """In the schema that the rows were in, which is then brought to the present one."""
    config = alembic_config(connection)
    script = ScriptDirectory.from_config(config)
    if revision not in {one.revision for one in script.walk_revisions()}:
        raise InvalidRequest("a newer version wrote this backup", param="file", fix="Restore it with that version.")
    if revision != script.get_current_head():
        command.downgrade(config, revision)
    tables = _tables(connection)
    connection.execute(tables["setting"].delete())
    for name, table in tables.items():
        found = [{column: _typed(table.c[column], value) for column, value in row.items()} for row in rows[name]]
        for start in range(0, len(found), AT_ONCE):
            connection.execute(insert(table), found[start:start + AT_ONCE])
        _count_on(connection, table)
    command.upgrade(config, "head")
    # Servers that have this library open already are to look.
    connection.execute(text("UPDATE revision SET number = number + 1"))


def _count_on(connection: Connection, table: Table) -> None:
    """Numbers that the database gives out itself go on after those of the backup."""
    if connection.dialect.name == "postgresql" and "id" in table.c and table.c.id.type.python_type is int:
        connection.execute(text(f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), "
                                f"(SELECT max(id) FROM {table.name})) FROM {table.name} LIMIT 1"))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return (value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)).isoformat()
    return value


def _typed(column: "Column[Any]", value: Any) -> Any:
    if isinstance(column.type, DateTime) and value is not None:
        return datetime.fromisoformat(value)
    return value
