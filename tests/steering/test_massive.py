"""Massive activations: planted ones are found and nothing else is, and what a spec does to them is told."""

from typing import Any

import numpy as np
import pytest
import torch

from steering.artifacts.source import Resolved
from steering.language.intervention import Intervention
from steering.language.scope import Scope
from steering.models.facts import ModelFacts
from steering.models.massive import Massive, MassiveLayer, find_massive
from steering.programs.compiler import compile_program
from steering.programs.massive import touches_first

D, LAYERS, TEXTS, LENGTH = 64, 4, 10, 12
FOUND = Massive({1: MassiveLayer({7: 400.0}, {}, 800.0, 400.0, 8.0, 0.5),
                 2: MassiveLayer({7: 400.0, 30: -200.0}, {12: 90.0}, 800.0, 450.0, 90.0, 0.5)}, {3: 1.0}, 10, 120)
FACTS = ModelFacts("m", "print", "qwen3", num_layers=LAYERS, d_model=D, num_heads=4, head_dim=16, d_ff=128,
                   vocab_size=50, context_length=64, massive=FOUND,
                   sites={site: tuple(range(LAYERS)) for site in ("resid_pre", "resid_post", "attn_out", "mlp_out",
                                                                  "head_out", "mlp_act")})


def noise(seed: int = 0, heavy: float | None = None) -> list[dict[int, torch.Tensor]]:
    """States of TEXTS texts at LAYERS layers, Gaussian or with Student's heavy tails."""
    draw = np.random.default_rng(seed)
    made = (draw.standard_normal if heavy is None else lambda size: draw.standard_t(heavy, size))
    return [{n: torch.tensor(made((LENGTH, D)), dtype=torch.float32) for n in range(LAYERS)} for _ in range(TEXTS)]


def tokens() -> list[list[int]]:
    """Token 3 stands in the middle of every text, and nowhere else."""
    return [[10 + n, 20, 21, 22, 23, 3, 24, 25, 26, 27, 28, 29] for n in range(TEXTS)]


def test_what_is_planted_is_found_and_nothing_else() -> None:
    states = noise(1)
    for text in states:
        for layer, values in ((1, {7: 400.0}), (2, {7: 400.0, 30: -200.0})):
            for dim, value in values.items():
                text[layer][0, dim] = value
                text[layer][5, dim] = 1.5 * value
        text[2][:, 12] = 150.0
    found = find_massive(tokens(), states)
    assert {n: set(one.first) for n, one in found.layers.items()} == {1: {7}, 2: {7, 12, 30}}
    assert {n: set(one.every) for n, one in found.layers.items()} == {1: set(), 2: {12}}
    assert found.layers[2].first[30] == -200.0 and found.layers[2].every[12] == 150.0
    assert found.tokens == {3: 1.0}
    assert found.layers[1].first_norm == pytest.approx(400.1, abs=0.5)
    assert found.layers[1].norm == pytest.approx(np.median([float(t[1][p].norm()) for t in states
                                                            for p in range(1, LENGTH)]), rel=0.05)
    assert Massive.from_json(found.to_json()) == found


@pytest.mark.parametrize("heavy", [None, 3.0, 1.0])
def test_noise_has_none_however_heavy_its_tails_are(heavy: float | None) -> None:
    states = noise(2, heavy)
    if heavy == 1.0:
        assert max(float((h.abs() / h.abs().median(-1, keepdim=True).values).max())
                   for text in states for h in text.values()) > 100
    assert find_massive(tokens(), states).layers == {}


def test_what_comes_and_goes_with_the_text_is_no_constant() -> None:
    states = noise(3)
    for text in states[:8]:
        text[1][0, 7] = 400.0
    assert find_massive(tokens(), states).layers == {}


@pytest.mark.parametrize(("scope", "touched"), [
    ({}, True), ({"prompt": "none"}, False), ({"prompt": {"positions": [-1]}}, False),
    ({"prompt": {"positions": [2, 0]}}, True), ({"prompt": {"windows": [[None, 3]]}}, True),
    ({"prompt": {"windows": [[1, None]]}}, False), ({"prompt": {"exclude": {"positions": [0]}}}, False),
    ({"prompt": {"exclude": {"positions": [1]}}}, True), ({"prompt": {"exclude": {"windows": [[0, 2]]}}}, False),
    ({"prompt": {"roles": ["user"]}}, False)])
def test_whether_a_scope_names_the_first_position(scope: dict[str, Any], touched: bool) -> None:
    assert touches_first(Scope.model_validate(scope)) is touched


LATER = {"prompt": {"exclude": {"positions": [0]}}, "generation": "all"}


def warned(op: str, inline: dict[str, Any], layers: list[int], facts: ModelFacts = FACTS, **fields: Any
           ) -> tuple[str, ...]:
    spec = {"op": op, "inline": inline, "layers": layers, **fields}
    return compile_program([Resolved(Intervention.model_validate(spec))], facts).compiled[0].applied.massive


def axis(dim: int, size: float = 1.0) -> dict[str, Any]:
    return {"vector": [size if n == dim else 0.0 for n in range(D)]}


def spread(seed: int = 4) -> dict[str, Any]:
    vector = np.random.default_rng(seed).standard_normal(D)
    return {"vector": (vector / np.linalg.norm(vector)).tolist()}


def test_steering_the_first_position_is_told_with_how_much_it_changes() -> None:
    [said] = warned("add", spread(), [0, 1, 2], strength=8)
    change = 8 * max(abs(spread()["vector"][dim]) / size for dim, size in ((7, 400), (30, 200), (12, 90)))
    assert said.startswith("the first position is steered at layers 1, 2,")
    assert f"by {100 * change:.2g} % at most" in said


@pytest.mark.parametrize("facts", [FACTS, ModelFacts(**{**FACTS.__dict__, "massive": Massive()}),
                                   ModelFacts(**{**FACTS.__dict__, "massive": None})])
def test_what_leaves_them_alone_is_not_told(facts: ModelFacts) -> None:
    if facts is not FACTS:
        assert warned("add", axis(7), [0, 1, 2], facts) == ()
    assert warned("add", spread(), [0, 1, 2], facts, scope=LATER) == ()
    assert warned("add", spread(), [0, 3], facts) == ()
    assert warned("mask", {"dims": [1, 2, 3]}, [1], facts, scope=LATER) == ()
    assert warned("sign_flip", {"dims": [1, 2], "polarity": [1, -1]}, [1, 2], facts, scope=LATER) == ()
    assert warned("neuron_mask", {"neurons": [7]}, [1], facts) == ()


@pytest.mark.parametrize(("op", "inline", "fields", "said"), [
    ("add", axis(7), {"scope": LATER}, "dims 7 at layer 1: 100 % of its change"),
    ("add", axis(7, 200.0), {}, "an entry changes by 50 %"),
    ("ablate", axis(7), {}, "an entry changes by 100 %"),
    ("mask", {"dims": [1, 7]}, {}, "dims 7 at layer 1: 100 % of its change lies there, and an entry changes by 100 %"),
    ("sign_flip", {"dims": [2, 7], "polarity": [1, 1]}, {}, "an entry changes by 200 %"),
    ("mask", {"dims": [7]}, {"scope": LATER}, "100 % of its change")])
def test_what_acts_on_massive_dims_is_told(op: str, inline: dict[str, Any], fields: dict[str, Any], said: str) -> None:
    assert said in " | ".join(warned(op, inline, [1], **fields))


def test_places_are_those_of_the_residual_stream() -> None:
    assert warned("add", axis(7), [1], site="resid_pre", scope=LATER) == ()
    assert "at layer 2" in warned("add", axis(7), [2], site="resid_pre", scope=LATER)[0]
    assert "100 % of its change" in warned("add", axis(7), [1], site="mlp_out", scope=LATER)[0]
    # Of what massive tokens are at every position, the first position is not the whole.
    [said] = warned("mask", {"dims": [12, 1, 2, 3]}, [2], scope=LATER)
    assert "an entry changes by 100 %" in said
