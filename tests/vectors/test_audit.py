"""The audit's chain: nothing is changed without a record, and no record is altered or lost unseen."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from steering.language.spec import Spec
from tests.vectors.making import PLACE, execute, metadata, vector_payload
from vectors import Library
from vectors.artifact import Patch
from vectors.library.audit.chain import BEGINNING, Record, verify
from vectors.library.audit.log import Wanted
from vectors.library.audit.notes import ACTOR, MOST_TOLD, Actor
from vectors.library.tables import Setting

SPEC = Spec.model_validate({"interventions": [{"artifact": "cheerful", "layers": [1]}]})


def records(library: Library) -> list[Record]:
    return library.audit.list(Wanted(after=0, limit=1000))


def some(library: Library) -> None:
    library.create(metadata(), vector_payload(1))
    library.create(metadata(), vector_payload(2))
    library.set_alias("cheerful", "production", 1)
    library.set_alias("cheerful", "production", 2)


def test_every_change_leaves_what_it_was_and_became(library: Library) -> None:
    token = ACTOR.set(Actor("key-1", "ada", "team", "10.0.0.7", "req-1"))
    try:
        some(library)
        library.patch("cheerful@1", Patch(description="other"))
        library.presets.create("calm", SPEC)
        library.presets.set_alias("calm", "production", 1)
        library.presets.remove_alias("calm", "production")
        library.switches.set_default_spec(SPEC)
        library.switches.clear_default_spec()
        library.switches.set_kill_switch(True)
        library.presets.delete("calm")
        made = library.keys.create(name="k", tenant="t", roles=["infer"], digest="d" * 64, expires_at=None)
        library.keys.change(made.id, blocked=True)
        library.keys.rotate(made.id, "e" * 64, timedelta(hours=1))
        library.keys.delete(made.id)
        library.evaluations.add("eval-1", datetime.now(UTC), ["cheerful@1"], {}, "{}")
        library.evaluations.delete("eval-1")
        library.remove_alias("cheerful", "production")
        library.delete("cheerful@1")
    finally:
        ACTOR.reset(token)
    found = records(library)
    assert [record.action for record in found] == [
        "artifact.create", "artifact.create", "artifact.alias", "artifact.alias", "artifact.patch", "preset.create",
        "preset.alias", "preset.alias", "default_spec.set", "default_spec.clear", "kill_switch.set", "preset.delete",
        "key.create", "key.change", "key.rotate", "key.delete", "evaluation.create", "evaluation.delete",
        "artifact.alias", "artifact.delete"]
    assert {(one.key_id, one.key_name, one.tenant, one.address, one.request_id) for one in found} == {
        ("key-1", "ada", "team", "10.0.0.7", "req-1")}
    by_number = {one.number: one for one in found}
    assert (by_number[3].target, by_number[3].before, by_number[3].after) == ("cheerful@production", None, 1)
    assert (by_number[4].before, by_number[4].after) == (1, 2)
    assert (by_number[5].before["description"], by_number[5].after["description"]) == ("", "other")
    assert by_number[9].before is None and by_number[9].after["interventions"][0]["artifact"] == "cheerful"
    assert by_number[10].before == by_number[9].after and by_number[10].after is None
    assert (by_number[14].before["blocked"], by_number[14].after["blocked"]) == (False, True)
    assert "d" * 64 not in str(found) and "e" * 64 not in str(found)
    assert library.audit.verify().fault is None


def test_the_digest_is_what_anybody_can_compute(library: Library) -> None:
    """The reference does not use the code: SHA-256 of the fields as JSON, with sorted keys and no spaces."""
    some(library)
    previous = BEGINNING
    for record in records(library):
        fields = {name: value for name, value in vars(record).items() if name != "digest"}
        fields["at"] = record.at.isoformat(timespec="microseconds")
        assert record.previous == previous
        previous = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert record.digest == previous
    assert library.audit.head() == (4, previous)


def test_the_same_again_and_a_refused_change_leave_no_record(library: Library) -> None:
    library.create(metadata(), vector_payload(1))
    library.create(metadata(), vector_payload(1))
    for wrong in (lambda: library.delete("nothing"), lambda: library.set_alias("cheerful", "production", 9)):
        with pytest.raises(Exception, match="there is no"):
            wrong()
    assert [record.number for record in records(library)] == [1]


def test_what_changes_rows_without_a_note_is_rolled_back(library: Library) -> None:
    with pytest.raises(RuntimeError, match="without a record"):
        library._database.write(lambda session: session.add(Setting(key="quiet", value=1)))
    with library._database.read() as session:
        assert session.get(Setting, "quiet") is None


@pytest.mark.parametrize("change", [
    "UPDATE audit SET target = 'other@production' WHERE number = 3",
    "UPDATE audit SET key_name = 'eve' WHERE number = 4",
    "UPDATE audit SET at = '2020-01-01 00:00:00.000000' WHERE number = 1",
    "UPDATE audit SET after = '7' WHERE number = 3",
    "DELETE FROM audit WHERE number = 2",
    "DELETE FROM audit WHERE number = 1",
    "UPDATE audit SET previous = (SELECT digest FROM audit WHERE number = 1) WHERE number = 4"])
def test_what_is_altered_or_taken_out_is_seen(library: Library, change: str) -> None:
    some(library)
    head = library.audit.head()
    assert library.audit.verify(head).fault is None
    execute(library, change)
    assert library.audit.verify().fault is not None


def test_an_end_that_was_cut_off_or_written_anew_is_seen_by_who_noted_it(library: Library) -> None:
    some(library)
    head = library.audit.head()
    execute(library, "DELETE FROM audit WHERE number = 4")
    assert library.audit.verify().fault is None
    fault = library.audit.verify(head).fault
    assert fault is not None and "record 4" in fault
    library.set_alias("cheerful", "production", 1)
    assert library.audit.verify().fault is None and library.audit.verify(head).fault is not None


def test_records_of_age_go_and_the_chain_says_so(library: Library) -> None:
    some(library)
    old = records(library)
    assert library.audit.expire(datetime.now(UTC) - timedelta(days=1)) == 0
    assert library.audit.expire(old[2].at) == 2
    assert [record.number for record in records(library)] == [3, 4, 5]
    assert library.audit.verify().fault is None
    # Again, so that the record of the first removal is one of those that go.
    library.set_alias("cheerful", "production", 1)
    assert library.audit.expire(datetime.now(UTC) + timedelta(days=1)) == 3
    assert [record.action for record in records(library)] == ["artifact.alias", "audit.expire"]
    assert library.audit.verify().fault is None
    execute(library, "DELETE FROM audit WHERE number = 6")
    assert library.audit.verify().fault is not None


def test_large_values_are_told_by_their_digest(library: Library) -> None:
    big = "x" * MOST_TOLD
    library.audit.add("note", "n", after=big)
    written = json.dumps(big)
    assert records(library)[0].after == {"characters": len(written),
                                         "sha256": hashlib.sha256(written.encode()).hexdigest()}


def test_filters(library: Library) -> None:
    some(library)
    library.audit.add("artifact", "plain", actor=Actor("k", "ada", "team", "", "req-9"))
    library.audit.add("artifacts.other", "no")
    audit = library.audit
    assert [one.number for one in audit.list(Wanted(action="artifact"))] == [5, 4, 3, 2, 1]
    assert [one.number for one in audit.list(Wanted(action="artifact.alias", after=0, limit=1))] == [3]
    assert [one.number for one in audit.list(Wanted(before=3))] == [2, 1]
    for wanted in (Wanted(tenant="team"), Wanted(key_id="k"), Wanted(request_id="req-9"), Wanted(target="plain")):
        assert [one.number for one in audit.list(wanted)] == [5]
    assert audit.list(Wanted(since=datetime.now(UTC) + timedelta(hours=1))) == []


def test_writers_of_several_processes_make_one_chain(library: Library, tmp_path: Path) -> None:
    library.create(metadata(), vector_payload(1))
    script = f"""
import sys
from vectors import Library
library = Library.open({PLACE.url(tmp_path)!r}, {str(tmp_path / "blobs")!r})
for n in range(15):
    library.set_alias("cheerful", f"a{{n}}-{{sys.argv[1]}}", 1)
"""
    running = [subprocess.Popen([sys.executable, "-c", script, str(n)]) for n in range(3)]
    assert [process.wait(timeout=240) for process in running] == [0, 0, 0]
    found = records(library)
    assert [record.number for record in found] == list(range(1, 47))
    assert {record.target for record in found[1:]} == {f"cheerful@a{n}-{p}" for n in range(15) for p in range(3)}
    assert library.audit.verify().fault is None


def test_an_aliased_chain_of_other_records_does_not_pass() -> None:
    """The control of `verify`: a chain made by hand passes, and each single change of it does not."""
    made: list[Record] = []
    for number in range(1, 4):
        one = Record(number, datetime(2026, 1, number, tzinfo=UTC), "a", "t", None, {"n": number}, None, "owner", "d",
                     "", "", made[-1].digest if made else BEGINNING)
        made.append(dataclasses.replace(one, digest=one.digested()))
    assert verify(made).fault is None
    for index in range(3):
        for field, value in (("action", "b"), ("after", None), ("tenant", "e"), ("number", 9), ("previous", "f" * 64)):
            altered = [*made]
            altered[index] = dataclasses.replace(made[index], **{field: value})
            assert verify(altered).fault is not None, (index, field)
            # Digested anew, it passes by itself and not with those that follow.
            altered[index] = dataclasses.replace(altered[index], digest=altered[index].digested())
            if index < 2 or field in ("number", "previous"):
                assert verify(altered).fault is not None, (index, field)


def test_reads_change_nothing(library: Library) -> None:
    some(library)
    before = library.audit.head()
    library.list()
    library.resolve("cheerful")
    library.audit.verify()
    assert library.audit.head() == before
    with library._database.read() as session:
        assert session.execute(text("SELECT count(*) FROM audit")).scalar() == 4
