"""Aligned concept vectors on layers that are rotations of one another."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.language.errors import TrimtabError
from tests.vectors.extract.toy import D_MODEL, NUM_LAYERS, Toy, cosine, never, noise, silent, unit
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods.aligned_concept import rotation
from vectors.extract.refusals import EmptyText, LeakingSplit, NoContrast, TooFewPairs

CONCEPT = unit("concept")
TURNS = [torch.linalg.qr(torch.stack([noise("turn", n, i) for i in range(D_MODEL)])).Q for n in range(NUM_LAYERS)]
# Noise of each layer: the last one is poor by itself.
NOISE = (0.5, 0.5, 2.5)


class TurnToy(Toy):
    """The stream after block l is the same content turned by TURNS[l], with noise of its own."""

    def __init__(self, *, planted: bool = True) -> None:
        super().__init__()
        self.planted = planted

    def forward(self, ids: Any, program: Any, prompt_length: int, seen: Any) -> torch.Tensor:
        logits = super().forward(ids, program, prompt_length, seen)
        for layer in range(NUM_LAYERS):
            seen["resid_post", layer] = torch.stack([self.content(ids) @ TURNS[layer] + NOISE[layer] * noise(
                "own", layer, tuple(ids))] * len(ids))
        return logits

    def content(self, ids: Sequence[int]) -> torch.Tensor:
        words = self.said(ids)
        shared = torch.stack([noise("word", word) for word in words if word.startswith("t")]).sum(dim=0)
        label = 1.0 if "up" in words else -1.0
        return shared * torch.linspace(3, 0.2, D_MODEL, dtype=torch.float64) + (2 * label * CONCEPT if self.planted
                                                                                   else 0)


def pairs(count: int = 80) -> list[dict[str, Any]]:
    return [{"positive": f"t{n} up", "negative": f"t{n} down"} for n in range(count)]


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    given = {"name": "concept", "pairs": pairs(), **fields}
    request = parse_request("aligned_concept", given)
    return prepare("aligned_concept", request, toy or TurnToy(), "test").run(silent, never)


def test_layers_agree_more_after_alignment_and_the_noisy_one_gains() -> None:
    found = extract()
    for layer in (0, 1):
        assert cosine(found.payload.layers[layer]["vector"], CONCEPT @ TURNS[layer]) > 0.85
    report = found.report
    assert report["cosine_in_shared_space"]["after"] == pytest.approx(1.0, abs=1e-4)
    assert report["cosine_in_shared_space"]["before"] < 0.98
    assert report["after"]["mean_auc"] > 0.8
    for control in ("auc_vs_shuffled_labels", "agreement_vs_random_vectors"):
        assert report["controls"][control]["draws"] == 20
        assert report["controls"][control]["percentile"] >= 95
    assert found.metadata.layers is not None and list(found.payload.layers) == [0, 1, 2]


def test_a_concept_that_is_not_there_stays_at_chance_however_well_layers_agree() -> None:
    report = extract(TurnToy(planted=False)).report
    assert 0.3 < report["after"]["mean_auc"] < 0.7
    # Agreement alone is no evidence: alignment makes layers agree on nothing, too.
    assert report["cosine_in_shared_space"]["after"] == pytest.approx(1.0, abs=1e-4)


def test_the_rotation_is_recovered() -> None:
    rows = torch.randn(100, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(rotation(rows + 3, 7 * rows @ TURNS[0]), TURNS[0], atol=1e-9)


@pytest.mark.parametrize(("given", "error", "param"), [
    ([*pairs(), {"positive": "", "negative": "t"}], EmptyText, "pairs[80].positive"),
    ([*pairs(), {"positive": "t", "negative": "t"}], NoContrast, "pairs[80]"),
    ([*pairs(), pairs()[0]], LeakingSplit, "pairs[80]"),
    (pairs(6), TooFewPairs, "pairs"),
])
def test_bad_pairs_are_refused(given: list[dict[str, Any]], error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(pairs=given)
    assert caught.value.param == param
