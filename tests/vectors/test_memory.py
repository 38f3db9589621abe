"""What the library keeps in memory: no query for what has not changed, and every change is seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import select

from steering.language.errors import NotFound
from steering.language.spec import Spec
from tests.vectors.making import metadata, open_library, queries, vector_payload
from vectors import Library, Patch
from vectors.library.audit.log import Wanted
from vectors.library.audit.notes import Note
from vectors.library.database import alembic_config
from vectors.library.revision import FRESH_S, LATE_S, Revision
from vectors.library.tables import Listing


def spec(strength: float = 1.0) -> Spec:
    return Spec.model_validate({"interventions": [{"artifact": "cheerful", "strength": strength}]})


READS: dict[str, Callable[[Library], Any]] = {
    "artifact": lambda library: library.source("cheerful").ref,
    "alias": lambda library: library.source("cheerful@stable").ref,
    "preset": lambda library: library.presets.resolve("calm").version,
    "default spec": lambda library: library.switches.default_spec(),
}


@pytest.fixture
def stocked(library: Library) -> Library:
    library.create(metadata(), vector_payload(1))
    library.set_alias("cheerful", "stable", 1)
    library.presets.create("calm", spec())
    library.switches.set_default_spec(spec())
    # The time in which the database is not asked again never ends on its own here.
    library._database.revision._clock = lambda: 0.0
    return library


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_was_read_once_needs_no_query(stocked: Library, read: Callable[[Library], Any]) -> None:
    with queries(stocked) as cold:
        first = read(stocked)
    with queries(stocked) as warm:
        assert [read(stocked) for _ in range(5)] == [first] * 5
    assert cold.count > 0 and warm.count == 0


def test_a_record_of_what_changed_nothing_leaves_what_was_read(stocked: Library) -> None:
    for read in READS.values():
        read(stocked)
    stocked.audit.add_all([Note("steer", "model")])
    # On a file the number is asked for again, because the file has changed.
    stocked._database.revision.current()
    with queries(stocked) as warm:
        for read in READS.values():
            read(stocked)
    assert warm.count == 0 and stocked.audit.list(Wanted(action="steer"))
    stocked.audit.add("change", "model")
    with queries(stocked) as cold:
        READS["preset"](stocked)
    assert cold.count > 0 and stocked.audit.verify().fault is None


EDITS: dict[str, Callable[[Library], Any]] = {
    "new version": lambda library: library.create(metadata(), vector_payload(2)),
    "alias": lambda library: library.set_alias("cheerful", "production", 1),
    "alias removed": lambda library: library.remove_alias("cheerful", "production"),
    "alias moved": lambda library: library.set_alias("cheerful", "stable", 2),
    "alias moved back": lambda library: library.set_alias("cheerful", "stable", 1),
    "preset": lambda library: library.presets.create("calm", spec(2.0)),
    "preset alias": lambda library: library.presets.set_alias("calm", "production", 1),
    "card": lambda library: library.patch("cheerful", Patch(card={"note": "new"})),
    "default spec": lambda library: library.switches.set_default_spec(spec(3.0)),
    "no default spec": lambda library: library.switches.clear_default_spec(),
    "preset deleted": lambda library: library.presets.delete("calm@2"),
    "version deleted": lambda library: library.delete("cheerful@2", force=True),
}


def told(library: Library) -> list[Any]:
    source = library.source("cheerful")
    preset = library.presets.resolve("calm")
    return [source.state, library.source("cheerful@stable").ref, preset.ref, preset.aliases, preset.spec,
            library.switches.default_spec()]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_every_edit_is_seen_by_the_next_read(stocked: Library, tmp_path: Path, database: str, elsewhere: bool
                                             ) -> None:
    """Of this library and of another one on the same database, against one that is opened anew, with nothing in memory.
    A file tells of its changes; a database that has to be asked is asked anew here, as it is after a while."""
    editor = open_library(tmp_path) if elsewhere else stocked
    before = told(stocked)
    for name, edit in EDITS.items():
        edit(editor)
        if elsewhere and database == "postgresql":
            stocked._database.revision.expire()
        fresh = open_library(tmp_path)
        now = told(stocked)
        assert now == told(fresh), name
        fresh.close()
        # An alias stands at the other version when this one goes.
        assert now != before or name == "preset deleted", name
        before = now
    stocked.delete("cheerful", force=True)
    editor._database.revision.expire()
    with pytest.raises(NotFound):
        editor.source("cheerful")


def test_a_number_is_asked_for_again_when_it_is_old_or_a_trace_says_so() -> None:
    now, trace, stored, asked = [0.0], [1], [5], []

    def read() -> int:
        asked.append(now[0])
        return stored[0]

    revision = Revision(read, lambda: trace[0], lambda: now[0])
    assert [revision.current() for _ in range(3)] == [5, 5, 5] and len(asked) == 1
    stored[0] = 6
    assert revision.current() == 5, "nothing tells of it yet"
    now[0] = FRESH_S + 0.01
    assert revision.current() == 6 and len(asked) == 2
    stored[0], trace[0] = 7, 2
    assert revision.current() == 7 and len(asked) == 3


def test_a_change_that_was_found_late_is_counted() -> None:
    now, stored, late = [0.0], [1], []
    revision = Revision(lambda: stored[0], clock=lambda: now[0])
    revision.late = lambda: late.append(now[0])
    revision.current()
    for after, changed, told in ((0.4, True, False), (0.9, True, False), (3.0, False, False), (3.0, True, True),
                                 (LATE_S + 0.1, True, False), (0.3, False, False)):
        now[0] += after
        stored[0] += changed
        if told:
            revision.wrote(stored[0])
        assert revision.current() == stored[0]
    # Of what was found by asking, only what may have been made more than a second before counts.
    assert late == [0.4 + 0.9 + 3.0 + 3.0 + LATE_S + 0.1]


def test_what_was_read_before_a_change_of_this_process_does_not_hide_it() -> None:
    def read() -> int:
        revision.wrote(8)
        return 7

    revision = Revision(read, clock=lambda: 0.0)
    assert revision.current() == 8


def test_lists_say_what_a_migration_finds(stocked: Library) -> None:
    """The rows that transactions keep are those that the migration makes of the rest."""
    stocked.create(metadata("other", tags=["calm", "low"], description="Of Two\nLines", model_id="m"),
                   vector_payload(3))
    stocked.create(metadata("other", site="resid_pre"), vector_payload(4))
    stocked.set_alias("other", "production", 1)
    stocked.create(metadata("gone"), vector_payload(5))
    stocked.delete("gone")

    def rows() -> list[dict[str, Any]]:
        with stocked._database.read() as session:
            return [{c.name: getattr(row, c.name) for c in Listing.__table__.columns}
                    for row in session.scalars(select(Listing).order_by(Listing.collection, Listing.name))]

    kept = rows()
    assert [row["name"] for row in kept] == ["cheerful", "other", "calm"]
    assert kept[1]["tags"] == "\ncalm\nlow\n" and kept[1]["site"] == "resid_post"
    with stocked._database.migrating() as connection:
        config = alembic_config(connection)
        command.downgrade(config, "0003")
        command.upgrade(config, "head")
    assert rows() == kept
