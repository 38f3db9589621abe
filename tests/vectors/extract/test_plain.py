"""Directions, probes, norms and signs are made without the massive dims of the model."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from steering.models.facts import ModelFacts
from steering.models.massive import Massive, MassiveLayer
from tests.vectors.extract.planted import DIRECTIONS, FACTS, Planted, cosine, never, pairs, request, run, silent
from tests.vectors.extract.test_sign_pattern import ANCHORS, DIMS, SignToy, extract
from vectors.extract import RECIPES
from vectors.extract.plain import massive_dims
from vectors.extract.subject import Tokens

DIM, OTHER, SIZE = 7, 20, 500.0


def layer(*first: int, every: Sequence[int] = ()) -> MassiveLayer:
    return MassiveLayer(dict.fromkeys(first, SIZE), dict.fromkeys(every, SIZE), 900.0, SIZE, SIZE, 0.5)


class Known(Planted):
    """At layer 2 one dim is large in every token, and noisy. known: whether anybody looked."""

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.known = known

    @property
    def facts(self) -> ModelFacts:
        found = Massive({2: layer(OTHER, every=[DIM])}, {}, 10, 100)
        return replace(FACTS, massive=found if self.known else None)

    def token(self, ids: Sequence[int], position: int, layer: int) -> torch.Tensor:
        h = super().token(ids, position, layer).clone()
        if layer == 2:
            drawn = torch.randn((), generator=torch.Generator().manual_seed(sum(ids)), dtype=torch.float64)
            h[DIM] += SIZE + 60 * drawn
        return h


METHODS = [name for name, recipe in RECIPES.items() if recipe.without_massive and "pairs" in recipe.request.model_fields
           and recipe.finishes == "trial"]


@pytest.mark.parametrize("method", METHODS)
def test_directions_norms_and_reports_are_those_without_them(method: str) -> None:
    found = run(request(pairs(60), method=method), Known(True), silent, never)
    vector = found.payload.layers[2]["vector"]
    assert vector[DIM] == 0.0 and vector[OTHER] == 0.0
    kept = [dim for dim in range(len(vector)) if dim not in (DIM, OTHER)]
    assert cosine(vector[kept], DIRECTIONS[2][kept].float()) > 0.95
    assert found.metadata.residual_norm[2] < 20
    assert found.report["massive_dims_left_out"] == {"2": [DIM, OTHER]}
    # Where nobody looked, the dim is in both.
    other = run(request(pairs(60), method=method), Known(False), silent, never)
    assert other.metadata.residual_norm[2] > SIZE / 2 and "massive_dims_left_out" not in other.report
    assert cosine(other.payload.layers[1]["vector"], found.payload.layers[1]["vector"]) == pytest.approx(1.0)


def test_the_contrastive_methods_and_the_probe_leave_them_out() -> None:
    assert {"mean_difference", "logistic_probe", "pca_pairwise", "pca_repe"} <= set(METHODS)
    assert all(RECIPES[name].without_massive for name in ("refusal_direction", "manifold", "entropic_steering",
                                                          "angular_steering", "aligned_concept"))


class Sinking(SignToy):
    """A model that keeps massive activations at the first position, and whose tokenizer puts nothing before a text."""

    @property
    def facts(self) -> ModelFacts:
        return replace(super().facts, massive=Massive({1: layer(DIMS[0])}, {}, 10, 100))

    def encode(self, prompt: object) -> Tokens:
        if prompt == "":
            return ()
        return (0,) if prompt == "\n" else super().encode(prompt)  # type: ignore[arg-type]


def test_signs_leave_known_dims_out_and_are_read_behind_another_token() -> None:
    found = extract(Sinking(), anchors=ANCHORS)
    assert found.report["prefix"] == 1
    assert DIMS[0] not in found.payload.layers[1]["dims"].tolist()
    assert set(DIMS[1:]) <= set(found.payload.layers[1]["dims"].tolist())
    assert DIMS[0] in found.payload.layers[2]["dims"].tolist()
    assert found.report["layers"]["1"]["massive_dims_left_out"] == 2


def test_other_places_have_none() -> None:
    facts = replace(FACTS, massive=Massive({2: layer(OTHER)}, {}, 10, 100))
    assert [massive_dims(facts, site, n) for site, n in (("resid_post", 2), ("resid_pre", 3), ("mlp_out", 2))] == [
        [OTHER]] * 3
    assert massive_dims(facts, "resid_post", 1) == massive_dims(facts, "mlp_act", 2) == []
    assert massive_dims(FACTS, "resid_post", 2) == []
