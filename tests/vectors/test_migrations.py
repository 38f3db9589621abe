import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect

import vectors.library.database
from server.errors import status_of
from tests.vectors.making import metadata, open_library, vector_payload
from vectors import LibraryUnavailable
from vectors.library.database import Database, alembic_config
from vectors.library.tables import Base


def test_migrations_lead_to_exactly_the_tables_of_the_code(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/library.db")
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        created = create_engine(f"sqlite:///{tmp_path}/by-code.db")
        Base.metadata.create_all(created)
        migrated, coded = inspect(connection), inspect(created)
        for table in coded.get_table_names():
            # Foreign keys with their actions, and uniqueness, which the comparison above may pass over on SQLite.
            assert migrated.get_foreign_keys(table) == coded.get_foreign_keys(table)
            assert migrated.get_unique_constraints(table) == coded.get_unique_constraints(table)
            assert migrated.get_pk_constraint(table) == coded.get_pk_constraint(table)


def test_every_migration_goes_down_and_up_again(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/library.db")
    with database.migrating() as connection:
        config = alembic_config(connection)
        command.downgrade(config, "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
        command.upgrade(config, "head")
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_there_is_one_line_of_migrations() -> None:
    with create_engine("sqlite://").connect() as connection:
        assert len(ScriptDirectory.from_config(alembic_config(connection)).get_heads()) == 1


def test_opening_again_keeps_what_is_there(tmp_path: Path) -> None:
    open_library(tmp_path).create(metadata(), vector_payload(1))
    assert open_library(tmp_path).resolve("cheerful").version == 1


def test_sqlite_is_set_up_to_be_durable(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/library.db")
    with database.engine.connect() as connection:
        settings = {pragma: connection.exec_driver_sql(f"PRAGMA {pragma}").scalar()
                    for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")}
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    open_library(tmp_path).close()
    with sqlite3.connect(tmp_path / "library.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(LibraryUnavailable, match="newer"):
        open_library(tmp_path)


@pytest.mark.parametrize("url", ["nonsense", "nosuchdatabase://x", "sqlite://", "sqlite:///:memory:",
                                 "sqlite:///file:x?mode=memory&uri=true", "sqlite:////proc/no/library.db"])
def test_databases_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(LibraryUnavailable) as caught:
        Database(url)
    assert status_of(caught.value) == 503


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "library.db").write_bytes(b"this is no database at all, whatever it is called" * 100)
    with pytest.raises(LibraryUnavailable):
        open_library(tmp_path)


def test_migrations_are_found_where_the_package_is_installed(tmp_path: Path) -> None:
    """Opened from another directory, with the packages on the path only by a link, as an installed wheel has them."""
    site = tmp_path / "site"
    site.mkdir()
    root = Path(vectors.library.database.__file__).parents[2]
    for package in ("steering", "vectors"):
        (site / package).symlink_to(root / package)
    script = f"""
import sys
sys.path.insert(0, {str(site)!r})
from vectors.library.database import Database
import vectors.library.database
assert vectors.library.database.__file__.startswith({str(site)!r})
Database("sqlite:///library.db")
"""
    away = tmp_path / "away"
    away.mkdir()
    subprocess.run([sys.executable, "-I", "-c", script], cwd=away, check=True, timeout=120)
    with sqlite3.connect(away / "library.db") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall()
    connection.close()
