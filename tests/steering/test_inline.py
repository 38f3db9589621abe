"""Inline numbers: every wrong form has a typed error with its field, and nothing else ever escapes the compiler."""

import base64
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from server.errors import status_of
from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved
from steering.language.errors import InvalidPayload, InvalidSpec, LayerOutOfRange, PayloadTooLarge, TrimtabError
from steering.language.intervention import Intervention
from steering.language.vocabulary import OPS, SITES, Op
from steering.models.facts import ModelFacts
from steering.ops import get_operation
from steering.programs import inline as module
from steering.programs.compiler import compile_program
from steering.programs.inline import inline_payload, split_inline
from steering.programs.program import Program

LAYERS = (0, 1, 2, 3)
FACTS = ModelFacts("m", "f", "llama", num_layers=4, d_model=4, num_heads=2, head_dim=3, d_ff=5, vocab_size=50,
                   context_length=64, num_experts=4, experts_per_token=2, sites={site: LAYERS for site in SITES})


def payload(op: Op, tensors: dict[str, Any], layers: list[int] | None = None) -> Payload:
    return inline_payload(tensors, get_operation(op), layers, FACTS)


def encoded(array: np.ndarray, **fields: Any) -> dict[str, Any]:
    return {"base64": base64.b64encode(array.tobytes()).decode(), "dtype": str(array.dtype),
            "shape": list(array.shape), **fields}


def test_same_numbers_at_every_layer() -> None:
    built = payload("add", {"vector": [1, 2.5, 0, -1]}, [3, 1])
    assert sorted(built.layers) == [1, 3]
    assert all(numbers["vector"].tolist() == [1, 2.5, 0, -1] for numbers in built.layers.values())
    assert built.kind == "vector"
    assert built.layers[1]["vector"].dtype == torch.float32


def test_numbers_by_layer() -> None:
    built = payload("add", {"vector": {"0": [1, 0, 0, 0], "-1": [0, 2, 0, 0]}})
    assert {n: t["vector"].tolist() for n, t in built.layers.items()} == {0: [1, 0, 0, 0], 3: [0, 2, 0, 0]}


def test_kind_follows_from_the_names() -> None:
    assert payload("ablate", {"vector": [1, 0, 0, 0]}, [0]).kind == "vector"
    assert payload("ablate", {"basis": [[1, 0, 0, 0]]}, [0]).kind == "subspace"
    probe = payload("ablate", {"weight": [1, 0, 0, 0], "bias": 0.25}, [0])
    assert probe.kind == "probe"
    assert probe.layers[0]["bias"].shape == ()
    assert float(probe.layers[0]["bias"]) == 0.25


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32"])
def test_base64_is_read_exactly(dtype: str) -> None:
    array = np.array([3, -1, 0, 2], dtype=np.dtype(dtype).newbyteorder("<"))
    assert payload("add", {"vector": encoded(array, dtype=dtype)}, [0]).layers[0]["vector"].tolist() == [3, -1, 0, 2]
    built = payload("add", {"vector": {"2": encoded(array, dtype=dtype)}})
    assert built.layers[2]["vector"].tolist() == [3, -1, 0, 2]


def test_base64_of_several_axes() -> None:
    basis = np.eye(4, dtype="<f4")[1:3]
    assert payload("ablate", {"basis": encoded(basis, dtype="float32")},
                   [0]).layers[0]["basis"].tolist() == basis.tolist()


GOOD = encoded(np.ones(4, dtype="<f4"), dtype="float32")


@pytest.mark.parametrize(("value", "param"), [
    ("abcd", "inline.vector"), (None, "inline.vector"), (True, "inline.vector"), ([True] * 4, "inline.vector"),
    (["1", "2", "3", "4"], "inline.vector"), ([1, 2, 3, "4"], "inline.vector"), ([1, 2, 3, None], "inline.vector"),
    ([[1, 2], [3]], "inline.vector"), ([1, [2, 3]], "inline.vector"), ([{"a": 1}], "inline.vector"),
    ([1, 2, 3, 10**400], "inline.vector"), ([[[[1]]]], "inline.vector"),
    ([1, 2, 3, float("nan")], "inline.layers[1].vector"), ([1, 2, 3, float("inf")], "inline.layers[1].vector"),
    ([1, 2, 3, 1e39], "inline.layers[1].vector"), ([0, 0, 0, 0], "inline.layers[1].vector"),
    ([], "inline.layers[1].vector"), ([[1, 2, 3, 4]], "inline.layers[1].vector"), (1.5, "inline.layers[1].vector"),
    ({"1": "abc"}, "inline.vector[1]"), ({"1": [[1], 2]}, "inline.vector[1]"), ({"1": None}, "inline.vector[1]"),
    ({"one": [1] * 4}, "inline.vector"), ({"": [1] * 4}, "inline.vector"), ({"1.0": [1] * 4}, "inline.vector"),
    ({"--1": [1] * 4}, "inline.vector"), ({"²": [1] * 4}, "inline.vector"), ({" 1": [1] * 4}, "inline.vector"),
    ({"999999": [1] * 4}, "inline.vector"), ({"4": [1] * 4}, "inline.vector"), ({"-5": [1] * 4}, "inline.vector"),
    ({"1": [1] * 4, "-3": [1] * 4}, "inline.vector"), ({"1": [1] * 4, "01": [1] * 4}, "inline.vector"),
    ({}, "inline.vector"), ({"1": {"2": [1] * 4}}, "inline.vector[1].base64"),
    ({**GOOD, "base64": "@@@@"}, "inline.vector.base64"), ({**GOOD, "base64": "AAAA"}, "inline.vector.base64"),
    ({**GOOD, "base64": "ä"}, "inline.vector.base64"), ({**GOOD, "base64": 5}, "inline.vector.base64"),
    ({**GOOD, "shape": [5]}, "inline.vector.base64"), ({**GOOD, "shape": [2**24] * 3}, "inline.vector.base64"),
    ({**GOOD, "shape": [-4]}, "inline.vector.shape[0]"), ({**GOOD, "shape": [4, 1, 1, 1]}, "inline.vector.shape"),
    ({**GOOD, "dtype": "float64"}, "inline.vector.dtype"), ({**GOOD, "dtype": "object"}, "inline.vector.dtype"),
    ({**GOOD, "order": "F"}, "inline.vector.order"), ({"base64": GOOD["base64"]}, "inline.vector.shape"),
    ({**GOOD, "base64": "", "shape": [0]}, "inline.layers[1].vector"),
    (encoded(np.full(4, np.nan, "<f4"), dtype="float32"), "inline.layers[1].vector"),
])
def test_wrong_numbers(value: Any, param: str) -> None:
    with pytest.raises((InvalidPayload, LayerOutOfRange)) as caught:
        payload("add", {"vector": value}, [1])
    assert caught.value.param == param
    assert 400 <= status_of(caught.value) < 500


def test_no_recursion_error_from_deep_lists() -> None:
    value: Any = 1.0
    for _ in range(50_000):
        value = [value]
    with pytest.raises(InvalidPayload) as caught:
        payload("add", {"vector": value}, [1])
    assert caught.value.param == "inline.vector"


@pytest.mark.parametrize(("op", "tensors", "name"), [
    ("mask", {"dims": [0.5]}, "dims"), ("mask", {"dims": [1.0]}, "dims"), ("mask", {"dims": [-1]}, "dims"),
    ("mask", {"dims": [1, 1]}, "dims"), ("mask", {"dims": [2**63]}, None), ("mask", {"dims": [[1]]}, "dims"),
    ("mask", {"dims": [1], "value": [1, 2]}, "value"), ("expert_mask", {"experts": [0, 0]}, "experts"),
    ("sign_flip", {"dims": [0], "polarity": [0]}, "polarity"), ("sign_flip", {"dims": [0], "polarity": [2]},
                                                                "polarity"),
    ("sign_flip", {"dims": [0, 1], "polarity": [1]}, "polarity"), ("head_mask", {"heads": [0], "shift": [1]}, "shift"),
    ("head_mask", {"heads": [0], "shift": [[1], [1]]}, "shift"), ("ablate", {"basis": [[1, 1, 0, 0]]}, "basis"),
    ("ablate", {"basis": [[1, 0, 0, 0], [1, 0, 0, 0]]}, "basis"), ("ablate", {"basis": [[2, 0, 0, 0]]}, "basis"),
    ("patch", {"basis": [[1, 0, 0, 0]], "mean": [1, 2]}, "mean"),
    ("affine", {"up": [[1, 2, 3, 4]], "down": [[1, 2, 3]], "bias": [0]}, "down"),
    ("affine", {"up": [[1, 2, 3, 4]], "down": [[1, 2, 3, 4]], "bias": [0, 1]}, "bias"),
])
def test_numbers_without_a_meaning(op: Op, tensors: dict[str, Any], name: str | None) -> None:
    with pytest.raises(InvalidPayload) as caught:
        payload(op, tensors, [1])
    assert caught.value.param == (f"inline.layers[1].{name}" if name else "inline.dims")


@pytest.mark.parametrize(("op", "tensors"), [
    ("add", {}), ("add", {"basis": [[1, 0, 0, 0]]}), ("affine", {"up": [[1.0]]}),
    ("add", {"vector": [1] * 4, "weight": [1] * 4}), ("add", {"weight": [1] * 4}), ("rotate", {"vector": [1] * 4}),
])
def test_names_that_make_no_kind(op: Op, tensors: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        payload(op, tensors, [1])
    assert caught.value.param == "inline"


def test_layers_missing() -> None:
    with pytest.raises(InvalidSpec) as caught:
        payload("add", {"vector": [1, 0, 0, 0]})
    assert caught.value.param == "layers"


def test_tensors_and_options_are_parted() -> None:
    clamp = get_operation("clamp")
    assert split_inline({"vector": [1], "min": 0}, clamp) == ({"vector": [1]}, {"min": 0})
    mask = get_operation("mask")
    assert split_inline({"dims": [1], "value": [2], "mode": "set"}, mask) == ({"dims": [1], "value": [2]},
                                                                              {"mode": "set"})
    for key in ("vectr", "options", "", "layers", "min"):
        with pytest.raises(InvalidSpec) as caught:
            split_inline({key: 1}, get_operation("add"))
        assert caught.value.param == f"inline.{key}"
        assert caught.value.fix
    with pytest.raises(InvalidSpec, match="Did you mean 'vector'"):
        split_inline({"vectr": 1}, get_operation("add"))


def test_limit_counts_numbers_once_however_many_layers_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NUMBERS", 8)
    payload("add", {"vector": [1.0] * 8}, list(LAYERS))
    payload("add", {"vector": {"0": [1.0] * 4, "1": [1.0] * 4}})
    for tensors in ({"vector": [1.0] * 9}, {"vector": {"0": [1.0] * 4, "1": [1.0] * 4, "2": [1.0] * 4}}):
        with pytest.raises(PayloadTooLarge) as caught:
            payload("add", tensors, [0])
        assert (caught.value.param, status_of(caught.value)) == ("inline.vector", 413)


def test_numbers_do_not_alias_what_the_user_sent() -> None:
    array = np.ones(4, dtype=np.float32)
    built = payload("add", {"vector": array.tolist()}, [0, 1])
    assert built.layers[0]["vector"].data_ptr() != array.ctypes.data


# Fuzzing: whatever stands in a spec, only typed errors come out.

_NUMBER = st.one_of(st.integers(-6, 6), st.floats(), st.integers(), st.sampled_from([1e300, -1e38, 1e-45, 10**400,
                                                                                     2**63]))
_LEAF = st.one_of(st.none(), st.booleans(), _NUMBER, st.text(max_size=3), st.sampled_from(["1", "-1", "AAAA", "set"]))
_KEYS = st.one_of(st.sampled_from(["0", "1", "-1", "3", "4", "base64", "shape", "dtype", "x"]), st.text(max_size=2))
_JSON = st.recursive(_LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=3),
                     max_leaves=8)
_SMALL = st.floats(-4, 4, width=32)
_ROW = st.lists(_SMALL | _NUMBER, min_size=4, max_size=4)
_TENSORS: dict[str, st.SearchStrategy[Any]] = {
    "vector": _ROW, "weight": _ROW, "bias": _NUMBER | st.lists(_SMALL, min_size=1, max_size=2),
    "basis": st.sampled_from([[[1, 0, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0]], [[0, 0.6, 0.8, 0]], [[1, 0]]]),
    "mean": _ROW,
    "dims": st.lists(st.integers(-1, 5), max_size=3), "polarity": st.lists(st.sampled_from([1, -1, 0]), max_size=3),
    "value": st.lists(_SMALL | _NUMBER, max_size=3) | _NUMBER, "neurons": st.lists(st.integers(0, 6), max_size=3),
    "heads": st.lists(st.integers(0, 2), max_size=2), "shift": st.lists(st.lists(_SMALL, min_size=3, max_size=3),
                                                                        max_size=2),
    "experts": st.lists(st.integers(0, 4), max_size=3), "up": st.lists(_ROW, max_size=2), "down": st.lists(_ROW,
                                                                                                           max_size=2),
    "mode": st.sampled_from(["off", "off_refill", "force", "scale", "bias", "set", "zero", "shift", "away", "to",
                             "by", "x"]),
    "scale": _NUMBER, "fraction": _NUMBER, "angle": _NUMBER, "min": _NUMBER, "max": _NUMBER,
    "multi_site": st.booleans(),
    "source_layer": st.integers(-6, 6), "basis_rank": st.integers(0, 5), "exclude": st.lists(st.integers(-1, 6),
                                                                                             max_size=3),
    "norm_match": st.booleans(), "preserve_norm": st.booleans(), "adaptive": st.booleans(),
    "renormalise": st.booleans(),
    "knots": st.sampled_from([[[0], [1], [2]], [[0], [1.5], [3e38]], [[0, 0], [1, 0], [0, 1]], [[0], [0], [1]]]),
    "points": st.sampled_from([[[1], [2], [-1]], [[1, 0], [0, 1], [-1, 0]], [[3e38], [0], [1]]]),
    "period": st.sampled_from([[0], [3], [1e-30], [0, 0], [4, 0]]), "keep_offset": st.booleans(),
    "target": st.one_of(_NUMBER, st.sampled_from(["a", "b", "z"]), st.lists(_SMALL, max_size=3)),
    "source": st.one_of(_NUMBER, st.sampled_from(["a", "b", "z"])), "path": st.sampled_from(["manifold", "chord"]),
    "labels": st.sampled_from([["a", "b", "c"], ["a"], ["a", "a", "b"]]),
    "encoder": st.lists(_ROW, min_size=2, max_size=2), "decoder": st.lists(_ROW, min_size=2, max_size=2),
    "encoder_bias": st.lists(_SMALL | _NUMBER, min_size=2, max_size=2), "decoder_bias": _ROW,
    "threshold": st.lists(_SMALL, min_size=2, max_size=2), "k": st.integers(-1, 3), "input_norm": st.integers(-1, 3),
    "error": st.sampled_from(["keep", "drop"]),
    "norm": _ROW, "method": st.sampled_from(["magnitude", "wina", "chess", "threshold", "random", "x"]),
    "share": st.sampled_from([0, 0.3, 0.5, 0.99, 1, -1]), "seed": st.integers(-1, 2**31),
    "shares": st.sampled_from([[0.5], [0.25, 0.75], [0.75, 0.25], [0.5, 2]]),
    "cut": st.lists(_SMALL | _NUMBER, min_size=1, max_size=2), "thresholds": st.lists(_ROW, min_size=1, max_size=2),
    "features": st.dictionaries(st.sampled_from(["0", "1", "2", "-1", "01", "x"]), st.fixed_dictionaries(
        {}, optional={name: _NUMBER for name in ("set", "add", "scale", "min")}), max_size=2),
}
_WANTED: dict[str, list[str]] = {
    "add": ["vector", "norm_match", "preserve_norm"], "ablate": ["vector", "multi_site", "source_layer"],
    "clamp": ["vector", "min", "max", "value"], "rotate": ["basis", "angle", "mode", "adaptive"],
    "affine": ["up", "down", "bias"], "sign_flip": ["dims", "polarity", "fraction", "exclude", "mode"],
    "mask": ["dims", "value", "mode", "scale"], "neuron_mask": ["neurons", "value", "mode", "scale"],
    "head_mask": ["heads", "shift", "mode", "scale"], "expert_mask": ["experts", "mode", "scale", "bias",
                                                                      "renormalise"],
    "patch": ["basis", "mean", "basis_rank", "vector", "neurons"],
    "sae": ["encoder", "encoder_bias", "decoder", "decoder_bias", "features", "threshold", "k", "input_norm",
            "error"],
    "manifold": ["basis", "mean", "knots", "points", "period", "target", "labels", "source", "fraction", "path",
                 "keep_offset"],
    "sparsify": ["norm", "method", "share", "shares", "cut", "thresholds", "seed"],
}


@st.composite
def _interventions(draw: st.DrawFn) -> dict[str, Any]:
    op = draw(st.sampled_from(OPS))
    numbers: dict[str, Any] = {}
    # A manifold has five tensors and an SAE four: drawn one by one they would hardly ever all be there.
    whole = {"manifold": 6, "sae": 5, "sparsify": 3}
    always = _WANTED[op][:whole[op]] if op in whole and draw(st.booleans()) else []
    drawn = draw(st.lists(st.sampled_from(_WANTED[op]), unique=True, min_size=1))
    for name in dict.fromkeys([*always, *drawn]):
        one = _TENSORS[name]
        numbers[name] = draw(st.one_of(one, one, one, st.dictionaries(_KEYS, one, max_size=2), _JSON))
    if draw(st.integers(0, 5)) == 0:
        numbers[draw(st.sampled_from(sorted(_TENSORS)) | st.text(max_size=4))] = draw(_JSON)
    item: dict[str, Any] = {"op": op, "inline": numbers}
    if draw(st.booleans()):
        item["layers"] = draw(st.sampled_from(["all", [0], [1, -1], [9], [1, 1], {"stop": 3}, {"stop": -9},
                                               {"start": -9, "stop": 2}, {"start": 3, "stop": 1}, {"depth": [0, 0.5]},
                                               {"depth": [0.9, 0.95]}]))
    if draw(st.booleans()):
        item["strength"] = draw(_NUMBER | st.fixed_dictionaries(
            {"value": _NUMBER, "unit": st.sampled_from(["raw", "unit", "rel", "sigma"])}))
    if draw(st.integers(0, 3)) == 0:
        item["site"] = draw(st.sampled_from(SITES))
    if draw(st.integers(0, 3)) == 0:
        item["options"] = draw(st.dictionaries(st.sampled_from(_WANTED[op]), _JSON, max_size=2))
    return item


@settings(max_examples=250, deadline=None)
@given(st.lists(_interventions(), min_size=1, max_size=2))
def test_only_typed_errors_escape(items: list[dict[str, Any]]) -> None:
    try:
        resolved = [Resolved(Intervention.model_validate(item)) for item in items]
    except ValidationError:
        return
    try:
        program = compile_program(resolved, FACTS)
    except TrimtabError as error:
        assert 400 <= status_of(error) < 500
        assert error.param is not None
        assert error.param.startswith("interventions[")
        assert error.message
        return
    _check(program)


def _check(program: Program) -> None:
    for item in program.compiled:
        for row in item.rows.values():
            unbounded = {"clamp": {"low", "high"}, "route": {"bias"}, "sae": {"low"}, "sae_topk": {"low"},
                         "sae_whole": {"low"}, "keep_over": {"cut"}}.get(row.kernel, set())
            for name, tensor in row.tensors.items():
                assert tensor.dtype == torch.float32
                assert not tensor.isnan().any()
                assert name in unbounded or tensor.isfinite().all()
    assert len(program.digest) == 64
