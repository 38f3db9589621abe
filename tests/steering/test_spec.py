"""The language: what parses, what is refused and under which name, and that the published schema says the same."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from steering.language.fields import MAX_INTERVENTIONS
from steering.language.intervention import Intervention
from steering.language.layers import LayerDepth, LayerRange
from steering.language.scope import PromptSelection, Scope
from steering.language.spec import Spec, Steering
from steering.language.strength import BareStrength, Strength
from steering.language.vocabulary import OPS, SITES
from steering.ops import get_operation

SCHEMA = Steering.model_json_schema()
VALIDATOR = jsonschema_rs.Draft202012Validator(SCHEMA)

FULL: dict[str, Any] = {
    "interventions": [
        {"artifact": "cheerful@production", "strength": {"value": 1.5, "unit": "rel"}, "layers": [3, 4],
         "scope": {"prompt": "none", "generation": "all"}},
        {"artifact": "refusal", "op": "ablate"},
        {"op": "expert_mask", "site": "router", "inline": {"experts": {"2": [3, 7]}, "mode": "off"}},
        {"artifact": "a@3", "layers": {"start": -4, "stop": -1, "step": 2}, "strength": -2, "override": ["model"],
         "scope": {"prompt": {"positions": [0, -1], "windows": [[1, None], [None, -2]], "token_ids": [5],
                              "roles": ["user"], "exclude": {"roles": ["system"], "positions": [3]}},
                   "generation": {"positions": [0], "windows": [[2, 4]], "token_ids": [1],
                                  "exclude": {"windows": [[None, 3]]}}}},
        {"artifact": "b", "layers": {"depth": [0.25, 0.5]}},
    ],
    "preset": "calm@2", "default": "override", "report": "summary",
}


def intervention(**fields: Any) -> Intervention:
    return Intervention.model_validate({"artifact": "a", **fields})


def fails_at(document: Any, *path: str | int) -> None:
    """Both the models and the schema must refuse, the models at this place."""
    with pytest.raises(ValidationError) as caught:
        Steering.model_validate(document)
    places = [error["loc"] for error in caught.value.errors()]
    assert any(place[:len(path)] == path for place in places), places


def one(**fields: Any) -> dict[str, Any]:
    return {"interventions": [{"artifact": "a", **fields}]}


def test_the_example_of_the_issue() -> None:
    body = """{"steering": {"interventions": [
      {"artifact": "cheerful@production", "strength": {"value": 1.5, "unit": "rel"}, "layers": [3, 4],
       "scope": {"prompt": "none", "generation": "all"}},
      {"artifact": "refusal", "op": "ablate"},
      {"op": "expert_mask", "site": "router", "inline": {"experts": {"2": [3, 7]}, "mode": "off"}}],
     "report": "summary"}}"""
    document = json.loads(body)["steering"]
    steering = Steering.model_validate(document)
    first, second, third = steering.interventions
    assert (first.artifact, first.strength, first.layers) == ("cheerful@production", Strength(value=1.5, unit="rel"),
                                                              [3, 4])
    assert first.scope == Scope(prompt="none", generation="all")
    assert (second.op, second.strength, second.layers, second.scope) == ("ablate", None, None, Scope())
    assert third.inline == {"experts": {"2": [3, 7]}, "mode": "off"}
    assert (steering.report, steering.default, steering.preset) == ("summary", "inherit", None)
    assert VALIDATOR.is_valid(document)


def test_an_artifact_alone_is_enough() -> None:
    item = Spec.model_validate({"interventions": [{"artifact": "cheerful"}]}).interventions[0]
    assert (item.op, item.site, item.layers, item.strength, item.options) == (None, None, None, None, {})
    assert item.scope == Scope(prompt="all", generation="all")


def _objects(node: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all JSON objects whose fields the language fixes."""
    found = [path] if isinstance(node, dict) and path[-1:] != ("inline",) and path[-2:-1] != ("inline",) else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found += _objects(value, (*path, key))
    return found


@pytest.mark.parametrize("path", _objects(FULL), ids=str)
def test_unknown_field_refused_at_every_level(path: tuple[str | int, ...]) -> None:
    assert VALIDATOR.is_valid(FULL)
    Steering.model_validate(FULL)
    document = deepcopy(FULL)
    node: Any = document
    for part in path:
        node = node[part]
    node["strenght"] = 1
    with pytest.raises(ValidationError) as caught:
        Steering.model_validate(document)
    assert any(error["type"] == "extra_forbidden" and error["loc"][-1] == "strenght"
               for error in caught.value.errors())
    assert not VALIDATOR.is_valid(document)


@pytest.mark.parametrize("op", OPS)
def test_unknown_option_refused(op: str) -> None:
    needed: Any = {"clamp": {"value": 1}, "rotate": {"angle": 10}, "sae": {"features": {"3": {"set": 1}}},
                   "sparsify": {"method": "wina", "share": 0.5}}.get(op, {})
    get_operation(op).options.model_validate(needed)  # type: ignore[index]
    with pytest.raises(ValidationError):
        get_operation(op).options.model_validate({**needed, "nonsense": 1})  # type: ignore[index]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 10**400, -10**400, True, "1", "NaN"])
def test_strength_takes_finite_numbers_only(number: Any) -> None:
    fails_at(one(strength=number), "interventions", 0, "strength")
    fails_at(one(strength={"value": number}), "interventions", 0, "strength")


@pytest.mark.parametrize("number", [True, "3", 1.5, None, 10**400, float("nan"), 5000, -600])
def test_layers_take_whole_numbers_only(number: Any) -> None:
    fails_at(one(layers=[number]), "interventions", 0, "layers")
    fails_at(one(layers={"stop": number}), "interventions", 0, "layers")


@pytest.mark.parametrize("number", [True, "3", 1.5, None, 10**400, float("nan")])
@pytest.mark.parametrize("part", ["prompt", "generation"])
def test_positions_take_whole_numbers_only(number: Any, part: str) -> None:
    fails_at(one(scope={part: {"positions": [number]}}), "interventions", 0, "scope", part)
    fails_at(one(scope={part: {"token_ids": [number]}}), "interventions", 0, "scope", part)
    if number is not None:
        fails_at(one(scope={part: {"windows": [[number, None]]}}), "interventions", 0, "scope", part)


def test_generated_positions_are_not_negative() -> None:
    for field, value in (("positions", [-1]), ("windows", [[-2, None]]), ("token_ids", [-1])):
        fails_at(one(scope={"generation": {field: value}}), "interventions", 0, "scope", "generation")
    # Roles belong to the prompt.
    fails_at(one(scope={"generation": {"roles": ["user"]}}), "interventions", 0, "scope", "generation")


@pytest.mark.parametrize("depth", [[0.5], [0, 1, 1], [-0.1, 1], [0, 1.1], ["0", 1], [False, True], 0.5])
def test_depth_is_two_fractions(depth: Any) -> None:
    fails_at(one(layers={"depth": depth}), "interventions", 0, "layers")


@pytest.mark.parametrize("layers", [[], "some", "", {}, {"start": 1}, {"stop": 2, "step": 0}, {"depth": [0, 1],
                                                                                            "stop": 3}, 3])
def test_layer_forms(layers: Any) -> None:
    fails_at(one(layers=layers), "interventions", 0, "layers")
    assert not VALIDATOR.is_valid(one(layers=layers))


def test_layer_forms_parse() -> None:
    assert intervention(layers="all").layers == "all"
    assert intervention(layers=[0, -1]).layers == [0, -1]
    assert intervention(layers={"stop": -1}).layers == LayerRange(start=0, stop=-1, step=1)
    assert intervention(layers={"depth": [0, 1]}).layers == LayerDepth(depth=(0.0, 1.0))


@pytest.mark.parametrize("ref", ["a", "a@3", "a@production", "0.9-b_c", "x" * 64, "a@123456789"])
def test_references(ref: str) -> None:
    assert intervention(artifact=ref).artifact == ref
    assert Steering(preset=ref).preset == ref
    assert VALIDATOR.is_valid({"interventions": [{"artifact": ref}]})


@pytest.mark.parametrize("ref", ["", "A", "a b", "../a", "a/b/c", "/a", "a/", ".a", "-a", "x" * 65, "a@", "a@-1", "a@A",
                                 "a@1234567890", "a@b@c", "a\n", "a\x00", "ä", "a@1.5", 3, None, ["a"]])
def test_references_refused(ref: Any) -> None:
    fails_at({"interventions": [{"artifact": ref}]}, "interventions", 0)
    if ref is not None:
        fails_at({"preset": ref}, "preset")


def test_one_source_only() -> None:
    fails_at({"interventions": [{"artifact": "a", "op": "add", "inline": {"vector": [1]}}]}, "interventions", 0)
    fails_at({"interventions": [{"op": "add"}]}, "interventions", 0)
    fails_at({"interventions": [{"inline": {"vector": [1]}}]}, "interventions", 0)


@pytest.mark.parametrize(("field", "value"), [
    ("op", "jiggle"), ("op", "ADD"), ("op", None.__class__), ("site", "resid"), ("scope", "all"),
    ("options", {"x" * 33: 1}), ("override", ["layer"]), ("override", "model"),
    ("strength", {"unit": "rel"}), ("strength", {"value": 1, "unit": "max_act"}), ("strength", [1]),
    ("scope", {"prompt": "some"}), ("scope", {"prompt": {"roles": ["User!"]}}),
    ("scope", {"prompt": {"positions": [0] * 4097}}), ("scope", {"prompt": {"windows": [[1]]}}),
    ("scope", {"prompt": {"windows": [[1, 2, 3]]}}), ("scope", {"prompt": "none", "generation": "none"}),
])
def test_wrong_values_refused_under_their_name(field: str, value: Any) -> None:
    fails_at(one(**{field: value}), "interventions", 0, field)


def test_null_stands_for_not_given() -> None:
    item = intervention(op=None, site=None, layers=None, strength=None)
    assert item == intervention()


def test_count_limit() -> None:
    Steering.model_validate({"interventions": [{"artifact": "a"}] * MAX_INTERVENTIONS})
    fails_at({"interventions": [{"artifact": "a"}] * (MAX_INTERVENTIONS + 1)}, "interventions")


@pytest.mark.parametrize("default", ["inherit", "none", "override"])
@pytest.mark.parametrize("preset", [None, "calm"])
@pytest.mark.parametrize("count", [0, 1])
def test_tri_state(default: str, preset: str | None, count: int) -> None:
    document = {"default": default, "preset": preset, "interventions": [{"artifact": "a"}] * count}
    given = preset is not None or count > 0
    valid = {"inherit": True, "none": not given, "override": given}[default]
    if valid:
        assert Steering.model_validate(document).default == default
    else:
        fails_at(document)


def test_empty_field_means_inherit() -> None:
    assert Steering.model_validate({}) == Steering(interventions=[], preset=None, default="inherit", report="none")


def test_bare_strength_keeps_its_unit_open_through_json() -> None:
    """2 is in the artifact's unit, {"value": 2} is raw; written and read back, each must stay what it was."""
    bare, raw = intervention(strength=2), intervention(strength={"value": 2})
    assert isinstance(bare.strength, BareStrength)
    assert not isinstance(raw.strength, BareStrength)
    assert bare.model_dump_json() != raw.model_dump_json()
    for exclude_unset in (False, True):
        for item in (bare, raw):
            again = Intervention.model_validate_json(item.model_dump_json(exclude_unset=exclude_unset))
            assert type(again.strength) is type(item.strength)
            assert again == item


def test_models_are_frozen_and_equal_by_value() -> None:
    steering = Steering.model_validate(FULL)
    with pytest.raises(ValidationError):
        steering.report = "none"
    assert Steering.model_validate_json(steering.model_dump_json()) == steering
    assert Steering.model_validate(steering.model_dump()) == steering


def test_an_artifact_alone_is_short_for_one_intervention() -> None:
    """Read from JSON and back, with the unit of the strength open or not as it was given."""
    for strength in (None, 2, {"value": 2}, {"kl": 0.3}):
        given = {"artifact": "calm@2"} if strength is None else {"artifact": "calm@2", "strength": strength}
        steering = Steering.model_validate(given)
        assert steering.short == Intervention.model_validate(given)
        again = Steering.model_validate_json(steering.model_dump_json())
        assert again == steering and type(again.strength) is type(steering.strength)
    assert Steering.model_validate({"preset": "warm"}).short is None


@pytest.mark.parametrize("document", [
    {"artifact": "calm", "interventions": [{"artifact": "warm"}]},
    {"strength": 2},
    {"strength": 2, "preset": "warm"},
    {"artifact": "calm", "layers": [3]},
    {"artifact": "Calm"},
    {"artifact": "calm", "default": "none"},
    {"graders": ["refusal"]},
    {"report": "outcomes"},
])
def test_the_short_form_is_as_strict_as_the_long_one(document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Steering.model_validate(document)


def test_selection_without_fields_is_everything() -> None:
    part = intervention(scope={"prompt": {"exclude": {"positions": [0]}}}).scope.prompt
    assert isinstance(part, PromptSelection)
    assert part.exclude is not None
    assert part.exclude.positions == [0]


def _json(max_leaves: int = 6) -> st.SearchStrategy[Any]:
    # 3.0 is an integer to JSON schema and none to the models, so whole floats are left out.
    broken = st.floats(-9, 9).filter(lambda x: not x.is_integer())
    leaves = (st.none() | st.booleans() | st.integers(-5, 5) | st.integers() | broken
              | st.sampled_from(["all", "none", "a", "a@2", "raw", "rel", "3", "", "user", "add", "resid_post"]))
    keys = st.sampled_from(["value", "unit", "stop", "start", "depth", "positions", "windows", "roles", "exclude",
                            "prompt", "generation", "token_ids", "x"])
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
                        max_leaves=max_leaves)


def _maybe(likely: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(likely, likely, likely, _json())


def _documents() -> st.SearchStrategy[Any]:
    whole = st.integers(-6, 6)
    window = st.tuples(st.none() | whole, st.none() | whole).map(list)
    pick: dict[str, Any] = {"positions": _maybe(st.lists(whole, max_size=3)),
                            "windows": _maybe(st.lists(window, max_size=2)),
                            "token_ids": _maybe(st.lists(st.integers(0, 9), max_size=3))}
    roles = {"roles": _maybe(st.lists(st.sampled_from(["user", "system"]), max_size=2))}
    prompt = st.fixed_dictionaries({}, optional={
        **pick, **roles, "exclude": _maybe(st.fixed_dictionaries({}, optional={**pick, **roles}))})
    generation = st.fixed_dictionaries({}, optional={
        **pick, "exclude": _maybe(st.fixed_dictionaries({}, optional=pick))})
    word = st.sampled_from(["all", "none"])
    scope = st.fixed_dictionaries({}, optional={"prompt": _maybe(word | prompt),
                                                "generation": _maybe(word | generation)})
    number = st.integers(-9, 9) | st.floats(-9, 9)
    layers = (st.just("all") | st.lists(whole, min_size=1, max_size=3)
              | st.fixed_dictionaries({"stop": whole}, optional={"start": whole, "step": st.integers(0, 3)})
              | st.fixed_dictionaries({"depth": st.tuples(st.floats(0, 1), st.floats(0, 1)).map(list)}))
    strength = number | st.fixed_dictionaries({"value": number}, optional={"unit": st.sampled_from(["raw", "rel"])})
    item = st.fixed_dictionaries({}, optional={
        "artifact": _maybe(st.just("a")), "op": _maybe(st.sampled_from(OPS)), "site": _maybe(st.sampled_from(SITES)),
        "inline": _maybe(st.just({"vector": [1.0]})), "layers": _maybe(layers), "strength": _maybe(strength),
        "scope": _maybe(scope), "options": st.dictionaries(st.text(max_size=3), _json(), max_size=1),
        "override": st.lists(st.sampled_from(["model", "site", "op", "x"]), max_size=2)})
    named = item.map(lambda fields: {"artifact": "a", **{k: v for k, v in fields.items() if k != "inline"}})
    return st.fixed_dictionaries({}, optional={
        "interventions": st.lists(named | item, max_size=2), "preset": _maybe(st.just("p")),
        "default": st.sampled_from(["inherit", "none", "override", "x"]), "report": _maybe(st.just("tokens"))})


def without_nulls(document: Any) -> Any:
    """The document without the fields that are null. Options and inline numbers are no models and stay as they are."""
    if not isinstance(document, dict):
        return [without_nulls(item) for item in document] if isinstance(document, list) else document
    return {key: value if key in ("options", "inline") else without_nulls(value)
            for key, value in document.items() if value is not None}


def test_a_field_that_is_null_is_absent() -> None:
    nulls = {"artifact": "a", "op": None, "scope": None, "options": None, "gate": None,
             "layers": {"stop": 3, "step": None}}
    document = {"interventions": [nulls], "report": None, "guard": None}
    assert Steering.model_validate(document) == Steering.model_validate(without_nulls(document))


@settings(max_examples=400, deadline=None)
@given(_documents())
def test_schema_accepts_what_the_models_accept(document: Any) -> None:
    """The schema is the published promise. It cannot say the rules between fields, so it may accept a little more. It
    says nothing of null, which stands for a field that is absent."""
    plain = without_nulls(document)
    try:
        Steering.model_validate(document)
    except ValidationError as refused:
        structural = {error["type"] for error in refused.errors()} - {"value_error"}
        if structural:
            assert not VALIDATOR.is_valid(plain), refused
    else:
        assert VALIDATOR.is_valid(plain)


def test_schema_is_stable_between_processes() -> None:
    """The same bytes whatever the hash seed, so that a drift test on the published file means something."""
    code = "import json; from steering.language.spec import Steering; print(json.dumps(Steering.model_json_schema()))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7"}, text=True,
                          capture_output=True, check=True)
    assert done.stdout.strip() == json.dumps(SCHEMA)


def test_schema_describes_every_field() -> None:
    for name, node in {"Steering": SCHEMA, **SCHEMA["$defs"]}.items():
        if node.get("type") == "object":
            assert node["additionalProperties"] is False, name
            assert all(field.get("description") for field in node["properties"].values()), name


@pytest.mark.parametrize(("op", "options"), [
    ("add", {"norm_match": True, "preserve_norm": True}), ("add", {"norm_match": 1}), ("add", {"norm_match": "yes"}),
    ("clamp", {}), ("clamp", {"value": 1, "min": 0}), ("clamp", {"min": 2, "max": 1}), ("clamp", {"min": True}),
    ("clamp", {"value": float("inf")}), ("clamp", {"value": 1e39}), ("rotate", {}), ("rotate", {"angle": float("nan")}),
    ("rotate", {"angle": 3601}),
    ("rotate", {"angle": 1, "mode": "at"}), ("sign_flip", {"fraction": 0}), ("sign_flip", {"fraction": 1.01}),
    ("sign_flip", {"fraction": True}), ("sign_flip", {"exclude": [-1]}), ("mask", {"mode": "off"}),
    ("mask", {"scale": float("nan")}), ("head_mask", {"mode": "set"}), ("expert_mask", {"scale": -1}),
    ("expert_mask", {"bias": 1e5}), ("expert_mask", {"mode": "on"}), ("patch", {"basis_rank": 0}),
    ("patch", {"basis_rank": True}), ("ablate", {"source_layer": "3"}), ("affine", {"scale": 1}),
])
def test_options_refused(op: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        get_operation(op).options.model_validate(options)  # type: ignore[index]


@pytest.mark.parametrize(("op", "options"), [
    ("mask", {"scale": 0.5}), ("neuron_mask", {"mode": "set", "scale": 0.5}),
    ("head_mask", {"mode": "shift", "scale": 0.5}),
    ("expert_mask", {"scale": 0.5}), ("expert_mask", {"mode": "force", "renormalise": False}),
    ("expert_mask", {"mode": "off", "bias": 1.0}), ("expert_mask", {"mode": "bias"}), ("ablate", {"source_layer": 1}),
])
def test_an_option_that_would_be_ignored_is_refused(op: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        get_operation(op).options.model_validate(options)  # type: ignore[index]


@pytest.mark.parametrize("field", ["positions", "windows", "token_ids", "roles"])
def test_an_empty_list_selects_neither_nothing_nor_everything(field: str) -> None:
    with pytest.raises(ValidationError):
        Scope.model_validate({"prompt": {field: []}})
