"""The database of effects: its migrations, what older ones become, and what a broken one costs."""

import math
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect

from server.effects.store import MIGRATIONS, Base, EffectMinute, EffectStore, EffectsUnavailable, Sample, Which
from vectors.library.database import alembic_config, migrate
from vectors.library.spaces import Reader, reading


def sample(minute: int = 10, artifact: str = "a@1", kl: float = 0.1) -> Sample:
    return Sample(minute, artifact, "add", "p@1", 4, kl, 0.0, 0.5, 0.0, 4, 0.25, "default")


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
    assert [row.length for row in store.totals(group="minute", which=Which(artifact="a@1"))] == [4.0, None]
    store.close()


def test_arms_and_tenants_come_and_go_with_their_migration(tmp_path: Path) -> None:
    """Up, a row whose names tell the tenant has it, and no other. Down, what counted for an arm is gone, so that what
    is left counts every completion once."""
    path = tmp_path / "effects.db"
    engine = create_engine(f"sqlite:///{path}")
    figures = {"minute": 9, "completions": 3, "tokens": 12, **dict.fromkeys((
        "kl_mean", "kl_p50", "kl_p95", "entropy_change", "top1_changed", "repetition"), 0.5)}
    graded = {"minute": 9, "grader": "refusal", "outcome": "answered", "answers": 5}
    names = {("team/calm@1", ""): "team", ("inline", "team/p@2"): "team", ("shared/calm@1", "p@1"): None,
             ("plain@1", ""): None, ("shared/calm@1", "other/p@1"): "other"}

    def add(table: str, **row: object) -> None:
        columns = ", ".join(row)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(row))})",
                                       tuple(row.values()))

    def rows(table: str, columns: str) -> list[tuple[object, ...]]:
        with engine.connect() as connection:
            return sorted(map(tuple, connection.exec_driver_sql(f"SELECT {columns} FROM {table}")), key=str)

    with engine.begin() as connection:
        command.upgrade(alembic_config(connection, MIGRATIONS), "0003")
    for artifact, preset in names:
        add("effect_minutes", artifact=artifact, preset=preset, op="add", **figures)
        add("outcome_minutes", artifact=artifact, preset=preset, **graded)
    before = {"effect_minutes": rows("effect_minutes", "artifact, preset, op, completions, kl_mean"),
              "outcome_minutes": rows("outcome_minutes", "artifact, preset, grader, outcome, answers")}
    with engine.begin() as connection:
        migrate(connection, MIGRATIONS)
    for table in before:
        assert rows(table, "artifact, preset, tenant, rollout, arm") == sorted(
            ((*pair, tenant, "", "") for pair, tenant in names.items()), key=str)
    arm = {"artifact": "all", "preset": "p@1", "tenant": "team", "rollout": "ro-1", "arm": "candidate"}
    add("effect_minutes", op="all", **arm, **figures)
    add("outcome_minutes", **arm, **graded)
    with engine.begin() as connection:
        command.downgrade(alembic_config(connection, MIGRATIONS), "0003")
    assert rows("effect_minutes", "artifact, preset, op, completions, kl_mean") == before["effect_minutes"]
    assert rows("outcome_minutes", "artifact, preset, grader, outcome, answers") == before["outcome_minutes"]
    engine.dispose()


def test_rows_of_unknown_tenants_are_the_houses_alone(tmp_path: Path) -> None:
    store = EffectStore(f"sqlite:///{tmp_path}/effects.db")
    store.write([replace(sample(artifact="all"), tenant=tenant) for tenant in ("acme", "acme", "other", "default")])
    with store.session() as session:
        session.add(EffectMinute(**figures_of(store), tenant=None))

    def told(tenant: str | None) -> dict[str | None, int]:
        with reading(Reader(tenant)):
            return {row.tenant: row.completions for row in store.totals(group="tenant")}

    everything = {"acme": 2, "other": 1, "default": 1, None: 1}
    assert told(None) == told("default") == everything
    assert told("acme") == {"acme": 2} and told("other") == {"other": 1} and told("nobody") == told("") == {}
    store.close()


def figures_of(store: EffectStore) -> dict[str, object]:
    """Of a row that the store has, all but whose it is."""
    with store.session() as session:
        row = session.query(EffectMinute).filter_by(tenant="default").one()
        return {column.name: getattr(row, column.name) for column in EffectMinute.__table__.columns
                if column.name not in ("id", "tenant")}


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
