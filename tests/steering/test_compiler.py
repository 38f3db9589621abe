"""Specs to programs: strengths by hand, layers, defaults of artifacts, refusals by field, digests."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from server.errors import status_of
from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import ArtifactMismatch, InvalidSpec, LayerOutOfRange, TrimtabError, UnsupportedSite
from steering.language.fields import MAX_INTERVENTIONS
from steering.language.intervention import Intervention
from steering.language.layers import LayerRange
from steering.language.strength import Strength
from steering.models.facts import ModelFacts
from steering.programs.compiler import compile_program
from steering.programs.program import Compiled, Program

D, L = 4, 6
ALL = tuple(range(L))
FACTS = ModelFacts("lab", "print-1", "qwen3_moe", num_layers=L, d_model=D, num_heads=2, head_dim=3, d_ff=5,
                   vocab_size=50, context_length=64, num_experts=4, experts_per_token=2,
                   sites={"resid_pre": ALL, "resid_post": ALL, "attn_out": ALL, "mlp_out": ALL, "head_out": ALL,
                          "mlp_act": (0, 1), "router": (2, 3, 4, 5)})
V = [3.0, 0.0, 4.0, 0.0]  # length 5


def compiled(*items: dict[str, Any], source: Source | None = None, facts: ModelFacts = FACTS) -> Program:
    resolved = []
    for item in items:
        intervention = Intervention.model_validate(item)
        resolved.append(Resolved(intervention, source if intervention.artifact is not None else None))
    return compile_program(resolved, facts)


def one(item: dict[str, Any], source: Source | None = None) -> Compiled:
    return compiled(item, source=source).compiled[0]


def add(**fields: Any) -> dict[str, Any]:
    return {"op": "add", "inline": {"vector": V}, "layers": [1], **fields}


def artifact(**fields: Any) -> Source:
    layers = fields.pop("numbers", {n: {"vector": torch.tensor(V) * (n + 1)} for n in (1, 2, 4)})
    kind = fields.pop("kind", "vector")
    return Source(**{"ref": "cheerful@3", "digest": "x", "payload": Payload.build(kind, layers), "op": "add",
                     "site": "resid_post", "model_id": "lab", "fingerprint": "print-1", "layers": [2, 4],
                     "strength": Strength(value=2.0, unit="rel"), "residual_norm": {1: 7.0, 2: 10.0, 4: 30.0},
                     "sigma": {1: 0.5, 2: 1.5, 4: 2.5}, **fields})


def delta(item: Compiled, layer: int, site: str = "resid_post") -> list[float]:
    return item.rows[site, layer].tensors["delta"].tolist()  # type: ignore[index]


NAMED = {"artifact": "cheerful"}


# Strength

@pytest.mark.parametrize(("strength", "factor"), [
    (None, 1.0), (2, 2.0), (-0.5, -0.5), ({"value": 2}, 2.0), ({"value": 10, "unit": "unit"}, 2.0),
    ({"value": -5, "unit": "unit"}, -1.0),
])
def test_strength_of_inline_numbers(strength: Any, factor: float) -> None:
    item = one(add(strength=strength))
    assert delta(item, 1) == pytest.approx([factor * x for x in V])
    assert item.applied.strength["scale"]["1"] == pytest.approx(factor)


@pytest.mark.parametrize(("strength", "length_2", "length_4"), [
    # Stored lengths: 15 at layer 2, 25 at layer 4. rel: times the mean norm there; sigma: times the deviation there.
    (None, 2 * 10.0, 2 * 30.0),
    (0.5, 0.5 * 10.0, 0.5 * 30.0),
    ({"value": 1.5, "unit": "rel"}, 15.0, 45.0),
    ({"value": 2, "unit": "sigma"}, 3.0, 5.0),
    ({"value": 2, "unit": "unit"}, 2.0, 2.0),
    ({"value": 2, "unit": "raw"}, 30.0, 50.0),
    ({"value": 2}, 30.0, 50.0),
])
def test_strength_units_of_an_artifact(strength: Any, length_2: float, length_4: float) -> None:
    item = one({**NAMED, "strength": strength}, artifact())
    assert sorted(item.rows) == [("resid_post", 2), ("resid_post", 4)]
    assert delta(item, 2) == pytest.approx([length_2 * x for x in (0.6, 0, 0.8, 0)])
    assert delta(item, 4) == pytest.approx([length_4 * x for x in (0.6, 0, 0.8, 0)])
    assert item.applied.strength["scale"] == {"2": pytest.approx(length_2 / 15), "4": pytest.approx(length_4 / 25)}


def test_bare_number_of_an_artifact_is_in_its_unit_and_stated_so() -> None:
    item = one({**NAMED, "strength": -1}, artifact(strength=Strength(value=3, unit="sigma")))
    assert (item.applied.strength["value"], item.applied.strength["unit"]) == (-1, "sigma")
    assert delta(item, 2) == pytest.approx([-1.5 * 0.6, 0, -1.5 * 0.8, 0])


@pytest.mark.parametrize("item", [
    add(), add(options={"norm_match": True}), add(options={"preserve_norm": True}), add(op="ablate"),
    {"op": "ablate", "inline": {"vector": V, "multi_site": True}}, add(op="clamp", options={"value": 1}),
    {"op": "rotate", "layers": [1], "inline": {"basis": [[1, 0, 0, 0], [0, 1, 0, 0]], "angle": 10}},
    {"op": "rotate", "layers": [1], "inline": {"basis": [[1, 0, 0, 0], [0, 1, 0, 0]], "angle": 10, "mode": "by"}},
    {"op": "expert_mask", "layers": [2], "inline": {"experts": [1], "mode": "force"}},
    {"op": "expert_mask", "layers": [2], "inline": {"experts": [1], "mode": "off_refill"}},
    {"op": "expert_mask", "layers": [2], "inline": {"experts": [1]}}, add(op="patch"),
    {"op": "mask", "layers": [1], "inline": {"dims": [0]}},
])
@pytest.mark.parametrize("zero", [0, -0.0, {"value": 0}])
def test_strength_0_touches_nothing(item: dict[str, Any], zero: Any) -> None:
    """Every op can be switched off by its strength; the receipt still says what was asked for."""
    program = compiled({**item, "strength": zero})
    assert program.acting == 0
    assert program.compiled[0].rows == {}
    assert program.compiled[0].applied.layers
    assert compiled(item).acting == 1


def test_strength_0_is_checked_all_the_same() -> None:
    with pytest.raises(TrimtabError):
        compiled(add(strength=0, inline={"vector": [1.0]}))


@pytest.mark.parametrize("unit", ["unit", "rel", "sigma"])
@pytest.mark.parametrize("item", [add(op="ablate"), add(op="clamp", options={"value": 1}), add(op="patch"),
                                  add(options={"norm_match": True})])
def test_units_without_a_meaning(item: dict[str, Any], unit: str) -> None:
    refused({**item, "strength": {"value": 1, "unit": unit}}, "strength.unit")


@pytest.mark.parametrize("unit", ["rel", "sigma"])
def test_units_that_need_a_record(unit: str) -> None:
    refused(add(strength={"value": 1, "unit": unit}), "strength.unit")
    bare = artifact(residual_norm={2: 1.0}, sigma={2: 1.0})
    refused({**NAMED, "strength": {"value": 1, "unit": unit}}, "strength.unit", source=bare)
    one({**NAMED, "strength": {"value": 1, "unit": unit}, "layers": [2]}, bare)


@pytest.mark.parametrize(("item", "param"), [
    (add(strength=3e38), "strength"), (add(strength={"value": 3e38, "unit": "unit"}, inline={"vector": [1e-3, 0, 0,
                                                                                                        0]}),
                                       "strength"),
    (add(op="patch", strength=3e38), "strength"), (add(op="ablate", inline={"vector": V}, strength=1e38), None),
    ({"op": "mask", "layers": [1], "inline": {"dims": [0], "mode": "scale", "scale": 3e38}, "strength": 9}, "strength"),
    ({"op": "head_mask", "layers": [1], "inline": {"heads": [0], "scale": 3e38}, "strength": 9}, "strength"),
    ({"op": "patch", "layers": [1], "inline": {"basis": [[0.6, 0.8, 0, 0]], "mean": [3e38, 3e38, 0, 0]}}, "strength"),
])
def test_overflow_is_refused(item: dict[str, Any], param: str | None) -> None:
    if param is None:
        compiled(item)
    else:
        refused(item, param)


# Layers

@pytest.mark.parametrize(("layers", "wanted"), [
    ([0, 5], [0, 5]), ([-1, -6], [5, 0]), ([3], [3]), ("all", [0, 1, 2, 3, 4, 5]), ({"stop": 3}, [0, 1, 2]),
    ({"start": 1, "stop": 6, "step": 2}, [1, 3, 5]), ({"start": -3, "stop": -1}, [3, 4]), ({"start": -6, "stop": 1},
                                                                                           [0]),
    ({"start": 4, "stop": -1}, [4]), ({"depth": [0, 1]}, [0, 1, 2, 3, 4, 5]), ({"depth": [0.5, 1]}, [3, 4, 5]),
    ({"depth": [0.25, 0.5]}, [2]), ({"depth": [0.16, 0.17]}, [1]), ({"depth": [0, 0.01]}, [0]),
])
def test_layers(layers: Any, wanted: list[int]) -> None:
    item = one(add(layers=layers))
    assert sorted(layer for _, layer in item.rows) == sorted(wanted)
    assert sorted(item.applied.layers) == sorted(wanted)


@pytest.mark.parametrize(("layers", "param"), [
    ([6], "layers[0]"), ([0, -7], "layers[1]"), ([1, -5], "layers"), ([2, 2], "layers"), ({"stop": 7}, "layers.stop"),
    ({"start": -7, "stop": 2}, "layers.start"), ({"start": 3, "stop": 3}, "layers"), ({"start": 4, "stop": 2},
                                                                                      "layers"),
    ({"stop": -6}, "layers"), ({"stop": -20}, "layers"), ({"depth": [0.9, 1]}, "layers.depth"),
    ({"depth": [0.5, 0.5]}, "layers.depth"), ({"depth": [0.8, 0.2]}, "layers.depth"), (None, "layers"),
])
def test_layers_refused(layers: Any, param: str) -> None:
    refused(add(layers=layers), param)


def test_numbers_by_layer_need_no_layers() -> None:
    item = one({"op": "add", "inline": {"vector": {"0": V, "-1": [1, 0, 0, 0]}}})
    assert delta(item, 0) == V
    assert delta(item, 5) == [1, 0, 0, 0]
    chosen = one({"op": "add", "inline": {"vector": {"0": V, "-1": [1, 0, 0, 0]}}, "layers": [-1]})
    assert list(chosen.rows) == [("resid_post", 5)]
    refused({"op": "add", "inline": {"vector": {"0": V}}, "layers": [0, 1]}, "layers")


@pytest.mark.parametrize(("layers", "wanted"), [
    (None, [2, 4]), ([1], [1]), ([-2, -5], [4, 1]), ("all", [1, 2, 4]), ({"depth": [0, 0.5]}, [1, 2]),
    ({"start": 1, "stop": 3}, [1, 2]),
])
def test_layers_of_an_artifact(layers: Any, wanted: list[int]) -> None:
    item = one({**NAMED, "layers": layers}, artifact())
    assert sorted(layer for _, layer in item.rows) == sorted(wanted)
    # The layer's own numbers, whichever order was asked for: length 5 (n + 1), rescaled to twice the norm there.
    for layer in wanted:
        assert delta(item, layer)[0] == pytest.approx(0.6 * 2 * {1: 7.0, 2: 10.0, 4: 30.0}[layer])


@pytest.mark.parametrize("layers", [[0], [1, 3], {"stop": 3}, {"depth": [0.5, 0.6]}])
def test_layers_that_an_artifact_has_not(layers: Any) -> None:
    refused({**NAMED, "layers": layers}, "layers", source=artifact())


def test_artifact_without_layers_acts_where_it_has_numbers() -> None:
    assert [n for _, n in one(NAMED, artifact(layers=None)).rows] == [1, 2, 4]


def test_artifact_of_a_deeper_model() -> None:
    deep = artifact(numbers={9: {"vector": torch.tensor(V)}}, layers=None)
    assert isinstance(refused(NAMED, "layers", source=deep), LayerOutOfRange)


# Artifacts: defaults and what overrides them

def test_artifact_alone() -> None:
    source = artifact(op="clamp", site="attn_out", options={"min": 1.0}, strength=Strength(value=0.5),
                      layers=LayerRange(
        start=1, stop=3))
    item = one(NAMED, source)
    assert (item.op, item.applied.artifact, item.applied.sites, item.applied.layers) == (
        "clamp", "cheerful@3", ("attn_out",), (1, 2))
    assert item.applied.options == {"value": None, "min": 1.0, "max": None}
    assert float(item.rows["attn_out", 1].tensors["amount"]) == 0.5


def test_options_of_the_request_win_over_those_of_the_artifact() -> None:
    source = artifact(op="clamp", options={"min": 1.0, "max": 2.0}, strength=Strength(value=1))
    assert one({**NAMED, "options": {"max": 5}}, source).applied.options == {"value": None, "min": 1.0, "max": 5}


def test_any_direction_can_be_ablated_and_clamped_by_name() -> None:
    added = artifact(strength=Strength(value=1.0))
    everywhere = {"multi_site": True, "source_layer": 2}
    taken = one({**NAMED, "op": "ablate", "override": ["op"], "options": everywhere}, added)
    assert taken.applied.sites == ("resid_pre", "attn_out", "mlp_out") and len(taken.rows) == 3 * L
    unit = torch.tensor(V) / 5
    assert torch.allclose(taken.rows["mlp_out", 5].tensors["down"][0], unit)
    held = one({**NAMED, "op": "clamp", "override": ["op"], "options": {"min": -1, "max": 2}}, added)
    assert torch.allclose(held.rows["resid_post", 4].tensors["direction"], unit)
    refused({**NAMED, "op": "clamp", "options": {"max": 1}}, "op", source=added)


def test_a_choice_of_the_request_puts_the_alternatives_of_the_artifact_aside() -> None:
    source = artifact(op="clamp", options={"value": 1.0}, strength=Strength(value=1))
    assert one({**NAMED, "options": {"max": 5}}, source).applied.options == {"value": None, "min": None, "max": 5}
    bounds = artifact(op="clamp", options={"min": 1.0, "max": 2.0}, strength=Strength(value=1))
    assert one({**NAMED, "options": {"value": 3}}, bounds).applied.options == {"value": 3, "min": None, "max": None}
    item = one({**NAMED, "options": {"shift": 1}}, ring(options={"labels": list("abc"), "target": "b"}))
    assert (item.applied.options["target"], item.applied.options["labels"]) == (None, list("abc"))
    with pytest.raises(InvalidSpec, match="shift counts"):
        one({**NAMED, "options": {"shift": 1, "target": "c"}}, ring(options={"labels": list("abc")}))


def ring(**fields: Any) -> Source:
    numbers = {2: {"basis": torch.eye(4)[:2], "mean": torch.zeros(4), "knots": torch.arange(3.0).unsqueeze(1),
                   "points": torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), "period": torch.tensor([3.0])}}
    return artifact(**{"kind": "manifold", "op": "manifold", "numbers": numbers, "layers": [2],
                       "strength": Strength(value=1.0), "options": {"labels": list("abc")}, **fields})


@pytest.mark.parametrize(("options", "param"), [
    ({}, "options"), ({"target": "d"}, "options.target"), ({"target": "a", "source": "x"}, "options.source"),
    ({"target": [1, 2]}, "options.target"), ({"shift": [1, 2]}, "options.shift"), ({"source": "a"}, "options"),
    ({"target": "a", "labels": ["a", "b"]}, "options.labels"), ({"target": "a", "fraction": 1.5}, "options.fraction"),
    ({"target": "a", "keep_offset": True, "path": "chord"}, "options"), ({"shift": 1, "path": "chord"}, "options"),
    ({"target": True}, "options.target"), ({"target": "a", "labels": ["a", "a", "b"]}, "options"),
])
def test_refusals_of_a_manifold_name_the_option(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        one({**NAMED, "options": options}, ring())
    assert caught.value.param is not None and caught.value.param.startswith(f"interventions[0].{param}")


def test_a_place_off_an_open_curve_is_refused_and_wraps_on_a_closed_one() -> None:
    closed, numbers = ring(), dict(ring().payload.layers[2])
    opened = ring(numbers={2: {**numbers, "period": torch.zeros(1)}})
    one({**NAMED, "options": {"target": 2}}, opened)
    around, there = (one({**NAMED, "options": {"target": target}}, closed).rows["resid_post", 2].tensors["bias"]
                     for target in (4, "b"))
    assert torch.allclose(around, there)
    with pytest.raises(InvalidSpec, match="places 0 to 2"):
        one({**NAMED, "options": {"target": 2.5}}, opened)


def test_a_fixed_goal_needs_no_table() -> None:
    kernels = {name: one({**NAMED, "options": options}, ring()).rows["resid_post", 2].kernel for name, options in {
        "label": {"target": "b"}, "from a label": {"target": "b", "source": "a", "fraction": 0.2},
        "chord": {"target": "b", "path": "chord", "fraction": 0.5}, "part of the way": {"target": "b", "fraction": 0.5},
        "shift": {"shift": 1}, "carried": {"target": "b", "keep_offset": True}}.items()}
    assert kernels == {"label": "affine", "from a label": "affine", "chord": "affine", "part of the way": "nearest",
                       "shift": "nearest", "carried": "nearest"}


def test_options_of_an_artifact_belong_to_its_op() -> None:
    source = artifact(op="clamp", options={"min": 1.0}, strength=Strength(value=1))
    item = one({**NAMED, "op": "add", "override": ["op"]}, source)
    assert item.applied.options == {"norm_match": False, "preserve_norm": False}


@pytest.mark.parametrize(("fields", "source", "param", "override"), [
    ({"op": "ablate", "strength": {"value": 1}}, artifact(), "op", "op"),
    ({"site": "mlp_out"}, artifact(), "site", "site"),
    ({}, artifact(fingerprint="print-2"), "artifact", "model"),
    ({}, artifact(fingerprint="print-2", model_id=None), "artifact", "model"),
])
def test_mismatch_needs_an_override(fields: dict[str, Any], source: Source, param: str, override: str) -> None:
    error = refused({**NAMED, **fields}, param, source=source)
    assert isinstance(error, ArtifactMismatch)
    assert status_of(error) == 409
    assert error.fix is not None
    assert f'"override": ["{override}"]' in error.fix
    wrong = [name for name in ("model", "site", "op") if name != override]
    refused({**NAMED, **fields, "override": wrong}, param, source=source)
    compiled({**NAMED, **fields, "override": [override]}, source=source)


def test_artifact_of_an_unknown_model_fits_any() -> None:
    compiled(NAMED, source=artifact(fingerprint=None, model_id=None))


@pytest.mark.parametrize("override", [[], ["model", "site", "op"]])
def test_no_override_makes_widths_or_kinds_fit(override: list[str]) -> None:
    wide = artifact(numbers={2: {"vector": torch.ones(D + 1)}}, layers=None)
    assert isinstance(refused({**NAMED, "override": override}, "artifact", source=wide), ArtifactMismatch)
    plane = artifact(kind="subspace", numbers={2: {"basis": torch.eye(D)[:2]}}, layers=None)
    assert isinstance(refused({**NAMED, "override": override}, "op", source=plane), ArtifactMismatch)


def test_errors_about_an_artifacts_numbers_name_the_artifact() -> None:
    source = artifact(kind="dim_mask", numbers={2: {"dims": torch.tensor([D])}}, op="mask", layers=None,
                      strength=Strength(value=1))
    refused(NAMED, "artifact", source=source)


# Refusals

def refused(item: dict[str, Any], param: str, source: Source | None = None) -> TrimtabError:
    """The compiler must refuse the second of two interventions, at this field."""
    with pytest.raises(TrimtabError) as caught:
        compiled(add(), item, source=source)
    assert caught.value.param == f"interventions[1].{param}"
    assert 400 <= status_of(caught.value) < 500
    return caught.value


@pytest.mark.parametrize(("item", "param"), [
    (add(site="router"), "site"), (add(op="neuron_mask", site="resid_post"), "inline.vector"),
    ({"op": "mask", "site": "mlp_act", "layers": [0], "inline": {"dims": [0]}}, "site"),
    (add(inline={"vector": [1.0]}), "inline.vector"), (add(inline={"vector": V + [1.0]}), "inline.vector"),
    (add(site="head_out"), "inline.vector"), (add(site="mlp_act"), "inline.vector"),
    ({"op": "neuron_mask", "layers": [2], "inline": {"neurons": [0]}}, "layers"),
    ({"op": "expert_mask", "layers": [0], "inline": {"experts": [0]}}, "layers"),
    ({"op": "expert_mask", "layers": "all", "inline": {"experts": [0]}}, "layers"),
    ({"op": "neuron_mask", "layers": [0], "inline": {"neurons": [5]}}, "inline.neurons"),
    ({"op": "expert_mask", "layers": [2], "inline": {"experts": [4]}}, "inline.experts"),
    ({"op": "expert_mask", "layers": [2], "inline": {"experts": [0, 1, 2], "mode": "force"}}, "inline.experts"),
    ({"op": "expert_mask", "layers": [2], "inline": {"experts": [0, 1, 2], "mode": "off_refill"}}, "inline.experts"),
    ({"op": "expert_mask", "layers": [2], "inline": {"experts": [0], "mode": "force"}, "strength": 0.5}, "strength"),
    ({"op": "rotate", "layers": [2], "inline": {"basis": [[1, 0, 0, 0], [0, 1, 0, 0]], "angle": 9}, "strength": 2},
     "strength"),
    ({"op": "rotate", "layers": [2], "inline": {"basis": [[1, 0, 0, 0], [0, 1, 0, 0]]}}, "options.angle"),
    (add(op="clamp"), "options"), (add(options={"normmatch": True}), "options.normmatch"),
    (add(options={"norm_match": "yes"}), "options.norm_match"), (add(inline={"vector": V, "x": 1}), "inline.x"),
    (add(inline={"vector": V, "norm_match": True}, options={"norm_match": True}), "options.norm_match"),
    (add(inline={}), "inline"), (add(inline={"vector": {"7": V}}), "inline.vector"),
    ({"op": "affine", "layers": [1], "inline": {"up": [V] * 5, "down": [V] * 5, "bias": [0] * 5}}, "inline"),
    ({"op": "ablate", "inline": {"vector": V, "multi_site": True}, "layers": [1]}, "layers"),
    ({"op": "ablate", "inline": {"vector": V, "multi_site": True}, "site": "resid_post"}, "site"),
    ({"op": "ablate", "inline": {"vector": {"1": V, "2": V}, "multi_site": True}}, "options.source_layer"),
    ({"op": "ablate", "inline": {"vector": {"1": V}, "multi_site": True, "source_layer": 2}}, "options.source_layer"),
    ({"op": "ablate", "inline": {"vector": {"1": V}, "multi_site": True, "source_layer": 9}}, "options.source_layer"),
])
def test_refusals_name_the_field(item: dict[str, Any], param: str) -> None:
    refused(item, param)


def test_site_that_the_model_has_not() -> None:
    dense = replace(FACTS, sites={"resid_post": ALL}, num_experts=0)
    with pytest.raises(UnsupportedSite) as caught:
        compiled({"op": "expert_mask", "layers": [2], "inline": {"experts": [0]}}, facts=dense)
    assert caught.value.code == "unsupported_site"
    with pytest.raises(UnsupportedSite) as caught:
        compiled({"op": "ablate", "inline": {"vector": V, "multi_site": True}}, facts=dense)
    assert caught.value.param == "interventions[0].options.multi_site"


def test_too_many_interventions() -> None:
    """Presets and defaults are joined with the request's own; together they may exceed what the models allow."""
    compiled(*[add()] * MAX_INTERVENTIONS)
    with pytest.raises(InvalidSpec) as caught:
        compiled(*[add()] * (MAX_INTERVENTIONS + 1))
    assert caught.value.param == "interventions"


def test_compiling_leaves_the_artifact_alone() -> None:
    source = artifact()
    before = {n: t["vector"].clone() for n, t in source.payload.layers.items()}
    program = compiled(NAMED, source=source)
    program.compiled[0].rows["resid_post", 2].tensors["delta"].zero_()
    assert all(torch.equal(source.payload.layers[n]["vector"], v) for n, v in before.items())


# Multi-site ablation

@pytest.mark.parametrize("item", [
    {"op": "ablate", "inline": {"vector": V, "multi_site": True}},
    {"op": "ablate", "inline": {"vector": V}, "options": {"multi_site": True}, "layers": "all"},
    {"op": "ablate", "inline": {"vector": {"3": V}, "multi_site": True}},
    {"op": "ablate", "inline": {"vector": {"3": V, "2": [1, 0, 0, 0]}, "multi_site": True, "source_layer": -3}},
])
def test_multi_site_ablation(item: dict[str, Any]) -> None:
    """One direction at resid_pre, attn_out and mlp_out of every layer, as the refusal-direction method has it."""
    compiled_item = one(item)
    assert set(compiled_item.rows) == {(site, n) for site in ("resid_pre", "attn_out", "mlp_out") for n in ALL}
    h = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    unit = torch.tensor(V) / 5
    for row in compiled_item.rows.values():
        moved = h + (h @ row.tensors["down"].T + row.tensors["bias"]) @ row.tensors["up"]
        torch.testing.assert_close(moved, h - torch.outer(h @ unit, unit))
    assert compiled_item.applied.sites == ("resid_pre", "attn_out", "mlp_out")
    assert compiled_item.applied.layers == ALL


def test_multi_site_ablation_of_an_artifact() -> None:
    source = artifact(op="ablate", options={"multi_site": True, "source_layer": 2}, strength=Strength(value=1))
    assert len(one(NAMED, source).rows) == 3 * L
    plain = one({**NAMED, "options": {"multi_site": False}}, source)
    assert list(plain.rows) == [("resid_post", 2), ("resid_post", 4)]


# Digests

BASE = [add(), {"op": "clamp", "layers": [1], "inline": {"vector": V, "min": 0.5}}]


@pytest.mark.parametrize(("first", "second"), [
    (add(strength=2), add(inline={"vector": [6.0, 0, 8.0, 0]})),
    (add(), add(strength=1)), (add(), add(strength={"value": 5, "unit": "unit"})),
    (add(layers=[1, 2]), add(layers=[2, 1])), (add(layers=[5]), add(layers=[-1])),
    (add(layers="all"), add(layers={"depth": [0, 1]})), (add(), add(inline={"vector": {"1": V}}, layers=None)),
    (add(inline={"vector": V, "norm_match": True}), add(options={"norm_match": True})),
    (add(op="ablate"), add(op="ablate", inline={"basis": [[0.6, 0, 0.8, 0]]})), (add(), add(site="resid_post")),
    (add(scope={"prompt": "all"}), add()),
])
def test_what_does_the_same_has_the_same_digest(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert compiled(first).digest == compiled(second).digest


def test_what_does_something_else_has_another_digest() -> None:
    variants = [
        BASE, BASE[::-1], BASE[:1], BASE[1:], [*BASE, BASE[0]], [add(layers=[2]), BASE[1]], [add(layers=[1, 2]),
                                                                                             BASE[1]],
        [add(strength=1.001), BASE[1]], [add(strength=-1), BASE[1]], [add(site="resid_pre"), BASE[1]],
        [add(inline={"vector": [4.0, 0, 3.0, 0]}), BASE[1]], [add(options={"norm_match": True}), BASE[1]],
        [add(options={"preserve_norm": True}), BASE[1]], [add(scope={"prompt": "none"}), BASE[1]],
        [add(scope={"generation": "none"}), BASE[1]], [add(scope={"prompt": {"positions": [0]}}), BASE[1]],
        [add(scope={"prompt": {"exclude": {"positions": [0]}}}), BASE[1]],
        [add(scope={"generation": {"token_ids": [0]}}), BASE[1]], [add(scope={"generation": {"positions": [0]}}),
                                                                   BASE[1]],
        [BASE[0], {**BASE[1], "inline": {"vector": V, "max": 0.5}}], [BASE[0], {**BASE[1],
                                                                                "scope": {"prompt": "none"}}],
    ]
    digests = [compiled(*items).digest for items in variants]
    assert len(set(digests)) == len(digests)


def test_digest_does_not_hang_on_names() -> None:
    """The same numbers, stored or inline, are one program to the bank and to the prefix cache."""
    stored = compiled({**NAMED, "strength": {"value": 1}, "layers": [1]}, source=artifact())
    assert stored.digest == compiled(add(strength=2)).digest


def test_acting_bits_are_those_with_rows() -> None:
    assert compiled(add(), add(strength=0), add()).acting == 0b101
