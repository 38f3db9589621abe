"""The database of effects: its migrations, what older ones become, and what a broken one costs."""

import math
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect

from server.effects.store import MIGRATIONS, Base, EffectStore, EffectsUnavailable, Sample
from vectors.library.database import alembic_config, migrate


def sample(minute: int = 10, artifact: str = "a@1", kl: float = 0.1) -> Sample:
    return Sample(minute, artifact, "add", "p@1", 4, kl, 0.0, 0.5, 0.0, 4, 0.25)


def test_migrations_lead_to_exactly_the_tables_of_the_code(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/effects.db")
    with engine.begin() as connection:
        migrate(connection, MIGRATIONS)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    with engine.begin() as connection:
        command.downgrade(alembic_config(connection, MIGRATIONS), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]


def test_rows_from_before_there_were_migrations_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "effects.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection, MIGRATIONS), "0001")
    engine.dispose()
    with sqlite3.connect(path) as old:
        old.execute("DROP TABLE alembic_version")
        old.execute("INSERT INTO effect_minutes (minute, artifact, op, preset, completions, tokens, kl_mean, kl_p50, "
                    "kl_p95, entropy_change, top1_changed, repetition) VALUES (9, 'a@1', 'add', 'p@1', 3, 12, .4, .4, "
                    ".4, 0, 0, 0)")
    old.close()
    store = EffectStore(f"sqlite:///{path}")
    store.write([sample(kl=0.8)])
    [total] = store.totals(group="artifact")
    assert total.completions == 4 and total.kl_mean == pytest.approx((3 * 0.4 + 0.8) / 4)
    assert [row.length for row in store.totals(group="minute", artifact="a@1")] == [4.0, None]
    store.close()


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    store = EffectStore(f"sqlite:///{tmp_path}/effects.db")
    store.write([sample()])
    store.close()
    with sqlite3.connect(tmp_path / "effects.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(EffectsUnavailable, match="newer"):
        EffectStore(f"sqlite:///{tmp_path}/effects.db").totals(group="all")


def test_it_opens_as_soon_as_it_can(tmp_path: Path) -> None:
    store = EffectStore(f"sqlite:///{tmp_path}/later/effects.db")
    with pytest.raises(EffectsUnavailable):
        store.write([sample()])
    (tmp_path / "later").mkdir()
    store.write([sample()])
    assert store.totals(group="all")[0].base_ended == 0.25
    store.close()


def test_a_failed_write_leaves_no_part_of_it(tmp_path: Path) -> None:
    store = EffectStore(f"sqlite:///{tmp_path}/effects.db")
    store.write([sample()])
    with sqlite3.connect(tmp_path / "effects.db", isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(EffectsUnavailable, match="locked"):
            store.write([sample(artifact="b@1"), sample(artifact="c@1")])
        holder.execute("ROLLBACK")
    holder.close()
    assert [row.artifact for row in store.totals(group="artifact")] == ["a@1"]
    store.close()


def test_ten_thousand_artifacts_in_one_minute(tmp_path: Path) -> None:
    store = EffectStore(f"sqlite:///{tmp_path}/effects.db")
    store.write([sample(artifact=f"name-{i}@1", kl=i / 10_000) for i in range(10_000)])
    store.write([sample(artifact="all") for _ in range(10_000)])
    found = store.totals(group="artifact", limit=50)
    assert [row.artifact for row in found] == [f"name-{i}@1" for i in range(9_999, 9_949, -1)]
    assert store.totals(group="minute")[0].completions == 10_000
    store.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_sample_without_a_number_costs_itself_alone(tmp_path: Path, bad: float) -> None:
    store = EffectStore(f"sqlite:///{tmp_path}/effects.db")
    samples = [sample(artifact=f"name-{i % 7}@1", kl=0.5) for i in range(147)]
    samples[80] = sample(artifact=f"name-{80 % 7}@1", kl=bad)
    refused = store.write(samples)
    rows = store.totals(group="artifact")
    assert refused == 1 and sum(row.completions for row in rows) == 146
    assert {row.kl_mean for row in rows} == {0.5}
    store.close()


def test_a_row_that_the_database_refuses_costs_itself_alone(tmp_path: Path) -> None:
    store = EffectStore(f"sqlite:///{tmp_path}/effects.db")
    store.write([sample()])
    with sqlite3.connect(tmp_path / "effects.db") as connection:
        connection.execute("CREATE TRIGGER picky BEFORE INSERT ON effect_minutes WHEN NEW.artifact = 'b@1' "
                           "BEGIN SELECT RAISE(ABORT, 'not this one'); END")
    connection.close()
    assert store.write([sample(artifact=name) for name in ("a@1", "b@1", "b@1", "c@1")]) == 2
    assert {row.artifact: row.completions for row in store.totals(group="artifact")} == {"a@1": 2, "c@1": 1}
    store.close()
