from pathlib import Path

import pytest

from steering.language.errors import Conflict, InvalidRequest, InvalidSpec, NotFound
from steering.language.spec import Spec
from tests.vectors.making import metadata, open_library, vector_payload
from vectors import Library

RICH = {"interventions": [
    {"artifact": "cheerful@production", "strength": {"value": 1.5, "unit": "rel"}, "layers": [3, -1],
     "scope": {"prompt": "none", "generation": {"windows": [[0, 5]], "exclude": {"token_ids": [7]}}}},
    {"artifact": "cheerful", "strength": 2},
    {"op": "expert_mask", "site": "router", "inline": {"experts": {"2": [3, 7]}, "mode": "off"}}]}


@pytest.fixture
def stocked(library: Library) -> Library:
    library.create(metadata(), vector_payload(1))
    library.set_alias("cheerful", "production", 1)
    return library


def simple(strength: float) -> Spec:
    return Spec.model_validate({"interventions": [{"artifact": "cheerful", "strength": strength}]})


def test_a_spec_comes_back_meaning_the_same(stocked: Library) -> None:
    spec = Spec.model_validate(RICH)
    assert stocked.presets.create("happy", spec).ref == "happy@1"
    assert stocked.presets.resolve("happy").spec == spec
    stocked.switches.set_default_spec(spec)
    assert stocked.switches.default_spec() == spec


def test_a_bare_strength_keeps_the_unit_of_the_artifact(stocked: Library) -> None:
    bare = simple(2)
    stocked.presets.create("bare", bare)
    stocked.presets.create("raw", Spec.model_validate({"interventions": [{"artifact": "cheerful",
                                                                          "strength": {"value": 2}}]}))
    assert stocked.presets.resolve("bare").spec == bare
    assert stocked.presets.resolve("raw").spec != bare


def test_versions_and_aliases_work_as_those_of_artifacts(stocked: Library) -> None:
    presets = stocked.presets
    for strength in (1, 2, 3):
        presets.create("happy", simple(strength))
    assert presets.create("happy", simple(2)).version == 2
    assert presets.create("happy", simple(2), "described").version == 4
    assert presets.resolve("happy").version == 4
    assert presets.set_alias("happy", "production", 2).aliases == ("production",)
    assert (presets.resolve("happy").version, presets.resolve("happy@latest").version) == (2, 4)
    with pytest.raises(Conflict):
        presets.delete("happy@2")
    assert presets.delete("happy@4") == ["happy@4"]
    assert presets.create("happy", simple(9)).version == 5
    presets.remove_alias("happy", "production")
    assert [p.version for p in presets.versions("happy")] == [5, 3, 2, 1]
    assert presets.delete("happy") == ["happy@5", "happy@3", "happy@2", "happy@1"]
    with pytest.raises(NotFound):
        presets.resolve("happy")


def test_names_of_presets_and_artifacts_do_not_mix(stocked: Library) -> None:
    stocked.presets.create("cheerful", simple(1))
    stocked.delete("cheerful", force=True)
    assert stocked.presets.resolve("cheerful").version == 1
    with pytest.raises(NotFound) as caught:
        stocked.resolve("cheerful")
    assert caught.value.param == "artifact"


PLACES = {
    "interventions[1].artifact": lambda name: {"interventions": [{"artifact": "cheerful"}, {"artifact": name}]},
    "interventions[0].gate.probe": lambda name: {"interventions": [{"artifact": "cheerful", "gate": {"probe": name}}]},
    "guard.monitor[0].artifact": lambda name: {"interventions": [{"artifact": "cheerful"}],
                                               "guard": {"monitor": [{"artifact": name, "threshold": 1.0}]}}}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("missing", ["nobody", "cheerful@7", "cheerful@canary"])
def test_artifacts_of_a_spec_must_exist(stocked: Library, missing: str, place: str) -> None:
    spec = Spec.model_validate(PLACES[place](missing))
    for store in (lambda: stocked.presets.create("happy", spec), lambda: stocked.switches.set_default_spec(spec)):
        with pytest.raises(NotFound) as caught:
            store()
        assert caught.value.param == f"spec.{place}"
    assert stocked.presets.list().items == []
    assert stocked.switches.default_spec() is None


@pytest.mark.parametrize("place", PLACES)
def test_an_artifact_that_a_stored_spec_names_anywhere_is_not_deleted(stocked: Library, place: str) -> None:
    stocked.create(metadata("watched"), vector_payload(3))
    stocked.presets.create("happy", Spec.model_validate(PLACES[place]("watched")))
    with pytest.raises(Conflict) as caught:
        stocked.delete("watched")
    assert "happy@1" in str(caught.value) and stocked.resolve("watched").version == 1


@pytest.mark.parametrize(("name", "description"), [("../x", ""), ("A", ""), ("", ""), ("ok", "bell \x07"),
                                                   ("ok", "x" * 9000), ("ok", "\ud800"), ("ok\n", "")])
def test_wrong_names_and_descriptions(stocked: Library, name: str, description: str) -> None:
    with pytest.raises(InvalidRequest):
        stocked.presets.create(name, simple(1), description)


@pytest.mark.parametrize("numbers", [float("nan"), "\ud800", object()])
def test_specs_that_json_cannot_hold(stocked: Library, numbers: object) -> None:
    spec = Spec.model_validate({"interventions": [{"op": "add", "inline": {"vector": {"3": [numbers]}}}]})
    with pytest.raises(InvalidSpec):
        stocked.presets.create("happy", spec)


def test_specs_nested_too_deep(stocked: Library) -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    spec = Spec.model_validate({"interventions": [{"op": "add", "inline": {"vector": deep}}]})
    with pytest.raises(InvalidSpec):
        stocked.presets.create("happy", spec)


def test_switches_are_seen_by_every_opener(stocked: Library, tmp_path: Path) -> None:
    other = open_library(tmp_path)
    assert (other.switches.kill_switch(), other.switches.default_spec()) == (False, None)
    stocked.switches.set_kill_switch(True)
    stocked.switches.set_default_spec(simple(3))
    other._database.revision.expire()
    assert other.switches.kill_switch() is True
    assert other.switches.default_spec() == simple(3)
    other.switches.set_kill_switch(False)
    other.switches.clear_default_spec()
    stocked._database.revision.expire()
    assert (stocked.switches.kill_switch(), stocked.switches.default_spec()) == (False, None)
