"""Features of an SAE as what gates and monitors read."""

from typing import Any

import pytest
import torch

from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import ArtifactMismatch, InvalidSpec
from steering.language.intervention import Intervention
from steering.models.facts import ModelFacts
from steering.ops import get_kernel
from steering.programs.compiler import compile_program
from steering.programs.reading import compile_reader

D, COUNT = 12, 30
FACTS = ModelFacts("m", "f", "llama", num_layers=2, d_model=D, num_heads=2, head_dim=6, d_ff=20, vocab_size=50,
                   context_length=64, sites={"resid_post": (0, 1), "mlp_act": (0, 1)})
VECTOR = torch.ones(D)


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def source(layer: int = 1, **more: torch.Tensor) -> Source:
    numbers = {"encoder": drawn(COUNT, D), "encoder_bias": drawn(COUNT, seed=2), "decoder": drawn(COUNT, D, seed=3),
               "decoder_bias": drawn(D, seed=4), **more}
    return Source("features@1", "", Payload.build("sae", {layer: numbers}), "sae", "resid_post")


def by_hand(h: torch.Tensor, index: int, threshold: float = 0.0, k: int | None = None) -> torch.Tensor:
    pre = h.double() @ drawn(COUNT, D).double().T + drawn(COUNT, seed=2)
    value = torch.where(pre > threshold, pre, 0.0).clamp_min(0)
    if k is not None:
        value[pre < pre.sort(dim=-1).values[:, [-k]]] = 0
    return value[:, index].float()


H = drawn(40, D, seed=9) * 2
THRESHOLD = torch.full((COUNT,), 0.9)


@pytest.mark.parametrize(("more", "hand"), [
    ({}, {}), ({"threshold": THRESHOLD}, {"threshold": 0.9}), ({"k": torch.tensor(4)}, {"k": 4})])
def test_a_feature_is_read(more: Any, hand: Any) -> None:
    reader = compile_reader(source(**more), FACTS, feature=7)
    assert (reader.form, reader.site, list(reader.layers), reader.feature) == ("feature", "resid_post", [1], 7)
    expected = by_hand(H, 7, **hand)
    assert 0 < int((expected > 0).sum()) < len(H)
    torch.testing.assert_close(reader.scores(1, H), expected, atol=1e-5, rtol=1e-5)
    assert reader.pooled(1, H, "mean") == pytest.approx(float(expected[1:].mean()), abs=1e-5)
    assert reader.pooled(1, H, "max") == pytest.approx(float(expected[1:].max()), abs=1e-5)
    assert reader.pooled(1, H, "last") == pytest.approx(float(expected[-1]), abs=1e-5)


@pytest.mark.parametrize("more", [{}, {"threshold": THRESHOLD}, {"k": torch.tensor(4)},
                                  {"input_norm": torch.tensor(2)}])
def test_what_is_read_is_to_the_bit_what_an_edit_finds(more: Any) -> None:
    """A feature that is set to the value that was read of it keeps its token's bits, however many tokens there are."""
    sae = source(**more)
    for index in (0, 7, 21):
        for token in range(len(H)):
            value = float(compile_reader(sae, FACTS, feature=index).scores(1, H)[token])
            spec = {"artifact": "features", "options": {"features": {str(index): {"set": value}}}}
            row = compile_program([Resolved(Intervention.model_validate(spec), sae)], FACTS).compiled[0].rows[
                "resid_post", 1]
            rows = {name: tensor[None] for name, tensor in row.tensors.items()}
            after = get_kernel(row.kernel)(H[token:token + 1], rows)
            assert torch.equal(after, H[token:token + 1])
            among_others = get_kernel(row.kernel)(H, rows)
            assert torch.equal(among_others[token], H[token])


def program(sae: Source, gate: dict[str, Any]) -> Any:
    vector = Source("push@1", "", Payload.build("vector", {1: {"vector": VECTOR}}), "add", "resid_post")
    spec = {"artifact": "push", "gate": {"probe": "features", "feature": 7, **gate}}
    return compile_program([Resolved(Intervention.model_validate(spec), vector, (sae,))], FACTS)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("direction", ["above", "below"])
@pytest.mark.parametrize("own", [0.0, 0.9])
def test_a_gate_decided_per_token_is_open_where_the_feature_says_so(threshold: float, direction: str, own: float
                                                                   ) -> None:
    more = {"threshold": torch.full((COUNT,), own)} if own else {}
    row = program(source(**more), {"when": "token", "threshold": threshold, "direction": direction}).compiled[0].rows[
        "resid_post", 1]
    after = get_kernel(row.kernel)(H, {name: tensor[None] for name, tensor in row.tensors.items()})
    value = by_hand(H, 7, own)
    opened = value > threshold if direction == "above" else value < threshold
    torch.testing.assert_close(after, H + opened[:, None] * VECTOR)


def test_a_gate_decided_for_a_prompt() -> None:
    gate = program(source(), {"threshold": 0.8, "pool": "max"}).gates[0]
    decision = gate.decide({"resid_post": {1: H}})
    assert decision.open == bool(by_hand(H, 7)[1:].max() > 0.8)
    assert gate.conditions[0].facts()["feature"] == 7


def test_what_cannot_be_read_is_refused_by_name() -> None:
    with pytest.raises(InvalidSpec, match="one feature is read at a time"):
        compile_reader(source(), FACTS)
    with pytest.raises(InvalidSpec, match="feature 30 does not exist"):
        compile_reader(source(), FACTS, feature=30)
    vector = Source("push@1", "", Payload.build("vector", {1: {"vector": VECTOR}}), "add", "resid_post")
    with pytest.raises(InvalidSpec, match="no feature is read"):
        compile_reader(vector, FACTS, feature=3)
    with pytest.raises(InvalidSpec, match="decided per token"):
        program(source(k=torch.tensor(4)), {"when": "token", "threshold": 0.5})
    numbers = {**source().payload.layers[1], **dict.fromkeys(("encoder", "decoder"), drawn(COUNT, 20)),
               "decoder_bias": drawn(20)}
    wide = Source("w@1", "", Payload.build("sae", {1: numbers}), "sae", "resid_post")
    with pytest.raises(ArtifactMismatch):
        compile_reader(wide, FACTS, feature=3)
