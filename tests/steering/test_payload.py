"""What makes the numbers of an artifact valid, and that they come back from a file as they went in."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from server.errors import status_of
from steering.artifacts.payload import KINDS, RULES, Kind, Payload
from steering.language.errors import InvalidPayload, TrimtabError

D, H = 4, 3
EYE = torch.eye(D)
VALID: dict[Kind, dict[str, torch.Tensor]] = {
    "vector": {"vector": torch.tensor([1.0, 2, 3, 4])},
    "subspace": {"basis": EYE[1:3], "mean": torch.ones(D)},
    "sign_pattern": {"dims": torch.tensor([3, 0]), "polarity": torch.tensor([1, -1])},
    "dim_mask": {"dims": torch.tensor([2]), "value": torch.tensor([0.5])},
    "neuron_set": {"neurons": torch.tensor([7, 1]), "value": torch.tensor([0.5, 2])},
    "head_set": {"heads": torch.tensor([0, 2]), "shift": torch.ones(2, H)},
    "expert_set": {"experts": torch.tensor([5])},
    "affine": {"up": EYE[:2], "down": EYE[2:], "bias": torch.zeros(2)},
    "probe": {"weight": torch.tensor([1.0, 0, 0, 0]), "bias": torch.tensor(-0.5)},
    "diagonal": {"scale": torch.ones(D), "shift": torch.tensor([0.0, 1, 2, 3])},
    "manifold": {"basis": EYE[1:3], "mean": torch.ones(D), "knots": torch.tensor([[0.0], [1.0], [2.5]]),
                 "points": torch.tensor([[1.0, 0], [0, 1], [-1, -1]]), "period": torch.tensor([4.0])},
    "sae": {"encoder": EYE[:3], "encoder_bias": torch.zeros(3), "decoder": EYE[1:], "decoder_bias": torch.ones(D),
            "threshold": torch.tensor([0.5, 0, 1]), "input_norm": torch.tensor(1)},
    "normality": {"mean": torch.ones(D), "scale": torch.ones(D), "basis": EYE[1:3], "variance": torch.tensor([2.0, 1]),
                  "rest": torch.tensor(0.5), "patterns": torch.tensor([[1.0], [-1]]), "window": torch.tensor(8),
                  "dimension": torch.tensor(3.0), "bandwidth": torch.tensor(2.0), "spectral_mean": torch.ones(6),
                  "spectral_whiten": torch.eye(6), "diffusion": torch.tensor([1.0, 0.25]),
                  "thresholds": torch.ones(5)},
    "sparsity": {"norm": torch.ones(D), "shares": torch.tensor([0.25, 0.5]), "cut": torch.tensor([0.5, 2.0]),
                 "thresholds": torch.ones(2, D)},
}
# An SAE has either thresholds or a k.
NAMES = [(kind, name) for kind in KINDS for name in RULES[kind] if (kind, name) != ("sae", "k")]


def refused(kind: Any, layers: Any, param: str) -> None:
    with pytest.raises(InvalidPayload) as caught:
        Payload.build(kind, layers)
    assert caught.value.param == param
    assert status_of(caught.value) == 400


def changed(kind: Kind, name: str, tensor: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    return {3: {**VALID[kind], name: tensor}}


@pytest.mark.parametrize("kind", KINDS)
def test_valid_payloads_survive_the_flat_form(kind: Kind) -> None:
    built = Payload.build(kind, {7: VALID[kind], 0: VALID[kind]})
    assert list(built.layers) == [0, 7]
    flat = built.to_tensors()
    assert set(flat) == {f"{n}.{name}" for n in (0, 7) for name in VALID[kind]}
    # Both layers were given the same tensors, which safetensors would not write.
    again = Payload.from_tensors(kind, load(save(flat)))
    assert again.kind == kind
    for n, tensors in built.layers.items():
        for name, tensor in tensors.items():
            assert torch.equal(again.layers[n][name], tensor)
            assert torch.equal(tensor.to(VALID[kind][name].dtype), VALID[kind][name])
            assert tensor.dtype == (torch.int64 if RULES[kind][name].integer else torch.float32)
    assert built.nbytes == 2 * sum(t.numel() * (8 if RULES[kind][n].integer else 4) for n, t in VALID[kind].items())


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_missing_tensors(kind: Kind, name: str) -> None:
    rest = {3: {other: t for other, t in VALID[kind].items() if other != name}}
    if RULES[kind][name].optional:
        assert name not in Payload.build(kind, rest).layers[3]
    else:
        refused(kind, rest, f"layers[3].{name}")


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_wrong_axes_and_natures(kind: Kind, name: str) -> None:
    good, where = VALID[kind][name], f"layers[3].{name}"
    refused(kind, changed(kind, name, good[None]), where)
    refused(kind, changed(kind, name, good.to(torch.bool)), where)
    refused(kind, changed(kind, name, good.to(torch.complex64)), where)
    if good.ndim:
        refused(kind, changed(kind, name, good[0]), where)
        refused(kind, changed(kind, name, good[:0]), where)
    if RULES[kind][name].integer:
        refused(kind, changed(kind, name, good.float()), where)
    else:
        for poison in (float("nan"), float("inf"), -float("inf")):
            bad = good.clone()
            bad.view(-1)[-1] = poison
            refused(kind, changed(kind, name, bad), where)
        refused(kind, changed(kind, name, good.double() * 1e300 + 1e300), where)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert Payload.build(kind, changed(kind, name, good.to(dtype))).layers[3][name].dtype == torch.float32


@pytest.mark.parametrize(("kind", "name", "tensor", "param"), [
    ("vector", "vector", torch.zeros(D), "vector"), ("probe", "weight", torch.zeros(D), "weight"),
    ("subspace", "basis", EYE[1:3] * 1.01, "basis"), ("subspace", "basis", torch.ones(2, D) / 2, "basis"),
    ("subspace", "basis", torch.zeros(1, D), "basis"), ("subspace", "mean", torch.ones(D + 1), "mean"),
    ("subspace", "basis", torch.ones(D + 1, D), "basis"),
    ("sign_pattern", "dims", torch.tensor([3, 3]), "dims"), ("sign_pattern", "dims", torch.tensor([3, -1]), "dims"),
    ("sign_pattern", "dims", torch.tensor([3, 2, 1]), "polarity"),
    ("sign_pattern", "polarity", torch.tensor([1, 0]), "polarity"),
    ("sign_pattern", "polarity", torch.tensor([1, -2**63]), "polarity"),
    ("dim_mask", "value", torch.ones(2), "value"), ("neuron_set", "neurons", torch.tensor([-2, 1]), "neurons"),
    ("head_set", "shift", torch.ones(3, H), "shift"), ("expert_set", "experts", torch.tensor([1, 1]), "experts"),
    ("affine", "down", torch.ones(2, D + 1), "down"), ("affine", "down", torch.ones(3, D), "down"),
    ("affine", "bias", torch.ones(3), "bias"), ("manifold", "basis", torch.ones(2, D) / 2, "basis"),
    ("manifold", "knots", torch.tensor([[0.0], [2], [1]]), "knots"), ("manifold", "period", torch.ones(1), "knots"),
    ("manifold", "points", torch.ones(2, 2), "points"), ("manifold", "points", torch.ones(3, 1), "points"),
    ("manifold", "period", torch.tensor([-1.0]), "period"), ("manifold", "period", torch.zeros(2), "period"),
    ("sae", "k", torch.tensor(2), "k"), ("sae", "input_norm", torch.tensor(3), "input_norm"),
    ("sae", "decoder", torch.ones(2, D), "decoder"), ("sae", "decoder", torch.ones(3, D + 1), "decoder"),
    ("sae", "threshold", torch.ones(2), "threshold"),
])
def test_wrong_meanings(kind: Kind, name: str, tensor: torch.Tensor, param: str) -> None:
    refused(kind, changed(kind, name, tensor), f"layers[3].{param}")


@pytest.mark.parametrize("size", [1e-30, 1e-44, 1e30, 3e38])
def test_tiny_and_huge_vectors_are_no_zeros(size: float) -> None:
    Payload.build("vector", {0: {"vector": torch.full((D,), size)}})


def test_a_tall_basis_costs_nothing() -> None:
    """Its Gram matrix would have 10**12 numbers."""
    refused("subspace", {0: {"basis": torch.ones(10**6, 2)}}, "layers[0].basis")


@pytest.mark.parametrize("k", [0, -1, 4])
def test_as_many_features_as_there_are_can_be_kept(k: int) -> None:
    topk = {name: tensor for name, tensor in VALID["sae"].items() if name != "threshold"}
    assert int(Payload.build("sae", {0: {**topk, "k": torch.tensor(3)}}).layers[0]["k"]) == 3
    refused("sae", {0: {**topk, "k": torch.tensor(k)}}, "layers[0].k")


def test_whole_payload() -> None:
    refused("vectors", {0: VALID["vector"]}, "kind")
    refused("vector", {}, "layers")
    refused("vector", {-1: VALID["vector"]}, "layers[-1]")
    refused("vector", {1: VALID["vector"], 2: {**VALID["vector"], "weight": torch.ones(D)}}, "layers[2]")
    refused("vector", {1: VALID["vector"], 2: {}}, "layers[2].vector")


@pytest.mark.parametrize("key", ["vector", "", ".", ".vector", "3.", "-1.vector", "1e3.vector", " 3.vector",
                                 "²x.vector",
                                 "³.vector", "1234567.vector", "3 .vector", "0x3.vector", "../3.vector"])
def test_flat_names(key: str) -> None:
    with pytest.raises(InvalidPayload) as caught:
        Payload.from_tensors("vector", {key: torch.ones(D)})
    assert caught.value.param == "tensors"


def test_the_callers_tensor_is_not_shared_by_gradient() -> None:
    vector = torch.ones(D, requires_grad=True)
    assert not Payload.build("vector", {0: {"vector": vector}}).layers[0]["vector"].requires_grad


_DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                           torch.uint8, torch.bool, torch.complex64])


@st.composite
def _tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    tensor = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return tensor.to(draw(_DTYPES)) * draw(st.sampled_from([1, 1, 0]))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.dictionaries(
    st.integers(-2, 5), st.dictionaries(st.sampled_from(sorted({n for _, n in NAMES} | {"x", ""})), _tensors(),
                                        max_size=4),
    max_size=3))
def test_anything_builds_or_is_a_typed_error(kind: Kind, layers: dict[int, dict[str, torch.Tensor]]) -> None:
    try:
        built = Payload.build(kind, layers)
    except TrimtabError as error:
        assert isinstance(error, InvalidPayload)
        assert error.param
        return
    assert all(t.isfinite().all() for tensors in built.layers.values() for t in tensors.values())
