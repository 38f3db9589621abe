import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect

import vectors.library.database
from server.errors import status_of
from steering.language.spec import Spec
from tests.vectors.making import PLACE, execute, metadata, open_database, open_library, vector_payload
from vectors import Filter, Library, LibraryUnavailable
from vectors.library.database import Database, alembic_config
from vectors.library.tables import Base

SPEC = Spec.model_validate({"interventions": [{"artifact": "cheerful", "layers": [1]}]})
ON_SQLITE = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def test_migrations_lead_to_exactly_the_tables_of_the_code(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        (tmp_path / "by-code").mkdir()
        created = create_engine(PLACE.url(tmp_path / "by-code", empty=True))
        Base.metadata.create_all(created)
        migrated, coded = inspect(connection), inspect(created)
        for table in coded.get_table_names():
            # Foreign keys with their actions, and uniqueness, which the comparison above may pass over on SQLite.
            assert migrated.get_foreign_keys(table) == coded.get_foreign_keys(table)
            assert migrated.get_unique_constraints(table) == coded.get_unique_constraints(table)
            assert migrated.get_pk_constraint(table) == coded.get_pk_constraint(table)
        created.dispose()


def test_every_migration_goes_down_and_up_again(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    with database.migrating() as connection:
        config = alembic_config(connection)
        command.downgrade(config, "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
        command.upgrade(config, "head")
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_each_migration_keeps_what_it_is_not_about(library: Library) -> None:
    """Down to each revision and up again, with something of every kind in the library."""
    fill(library)
    wanted = told(library)
    with library._database.migrating() as connection:
        revisions = [found.revision for found in
                     ScriptDirectory.from_config(alembic_config(connection)).walk_revisions()]
    assert revisions[-1] == "0001"
    for revision in revisions[1:]:
        with library._database.migrating() as connection:
            command.downgrade(alembic_config(connection), revision)
            assert MigrationContext.configure(connection).get_current_revision() == revision
            command.upgrade(alembic_config(connection), "head")
        # Past the memory, which knows nothing of migrations.
        library._database.revision._fresh_until = 0.0
        assert told(library) == wanted, revision
        assert library.damaged() == []
    # What is stored afterwards has numbers of its own.
    assert library.create(metadata(), vector_payload(9)).version == 3


def fill(library: Library) -> None:
    for seed in (1, 2):
        library.create(metadata(tags=["calm", "low"], card={"auc": 0.5}), vector_payload(seed))
    library.create(metadata("other", fingerprint="f" * 64), vector_payload(3))
    library.set_alias("cheerful", "production", 1)
    library.presets.create("happy", SPEC, "for tests")
    library.presets.set_alias("happy", "stable", 1)
    library.switches.set_default_spec(SPEC)
    library.switches.set_kill_switch(True)
    key = library.keys.create(name="k", tenant="t", roles=["infer"], digest="d" * 64, expires_at=None)
    library.policies.set("t", key.id, {"strength": 2})
    library.evaluations.add("eval-1", datetime.now(UTC), ["cheerful@1"], {}, "{}")


def told(library: Library) -> list[Any]:
    """What migrations after the first are not about."""
    return [library.versions("cheerful"), library.versions("other"), library.list(Filter(tag="calm")).items,
            library.resolve("cheerful"), library.presets.versions("happy"), library.presets.resolve("happy@stable"),
            library.switches.default_spec(), library.switches.kill_switch(), library.usage()]


@ON_SQLITE
def test_there_is_one_line_of_migrations() -> None:
    with create_engine("sqlite://").connect() as connection:
        assert len(ScriptDirectory.from_config(alembic_config(connection)).get_heads()) == 1


def test_opening_again_keeps_what_is_there(tmp_path: Path) -> None:
    open_library(tmp_path).create(metadata(), vector_payload(1))
    assert open_library(tmp_path).resolve("cheerful").version == 1


@ON_SQLITE
def test_sqlite_is_set_up_to_be_durable(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/library.db")
    with database.engine.connect() as connection:
        settings = {pragma: connection.exec_driver_sql(f"PRAGMA {pragma}").scalar()
                    for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")}
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_a_database_of_a_newer_version_is_left_alone(library: Library, tmp_path: Path) -> None:
    execute(library, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(LibraryUnavailable, match="newer"):
        open_library(tmp_path)


@ON_SQLITE
@pytest.mark.parametrize("url", ["nonsense", "nosuchdatabase://x", "sqlite://", "sqlite:///:memory:",
                                 "sqlite:///file:x?mode=memory&uri=true", "sqlite:////proc/no/library.db"])
def test_databases_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(LibraryUnavailable) as caught:
        Database(url)
    assert status_of(caught.value) == 503


@ON_SQLITE
def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "library.db").write_bytes(b"this is no database at all, whatever it is called" * 100)
    with pytest.raises(LibraryUnavailable):
        open_library(tmp_path)


@ON_SQLITE
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
