"""Groups on a model some of whose neurons are active together for each concept, and write its word."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.language.errors import TrimtabError
from tests.vectors.extract.toy import D_FF, VOCAB, Toy, cosine, never, noise, silent
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods import snmf
from vectors.extract.refusals import ExtractionCancelled, InvalidData, TooFewExamples

CONCEPTS = ("sea", "fire", "stone", "tree")
LAYER = 1
# Neurons of each concept with their sign; neighbours share one.
GROUPS = {concept: {(5 * n + i) % D_FF: (1.0, -1.5, 2.0, 1.2, -1.0, 0.8)[i] for i in range(6)}
          for n, concept in enumerate(CONCEPTS)}


class GroupToy(Toy):
    """The neurons of a concept are active, at layer 1, at every word that begins with it."""

    def __init__(self, *, planted: bool = True) -> None:
        super().__init__()
        self.planted = planted

    def neurons(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        out = 0.05 * torch.stack([noise("n", layer, tuple(ids), n, width=D_FF) for n in range(len(ids))])
        for n, word in enumerate(self.said(ids)):
            concept = word.rstrip("0123456789")
            if layer == LAYER and self.planted and concept in GROUPS:
                size = 1 + float(noise("size", word)[0].abs())
                for neuron, value in GROUPS[concept].items():
                    out[n, neuron] += size * value
        return out

    def forward(self, ids: Any, program: Any, prompt_length: int, seen: Any) -> torch.Tensor:
        logits = super().forward(ids, program, prompt_length, seen)
        for concept in CONCEPTS:
            logits[self.token(f"{concept}word")] = float(seen["mlp_act", LAYER][-1] @ group_of(concept))
        return logits

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        return torch.zeros(VOCAB, dtype=torch.float64)


def group_of(concept: str) -> torch.Tensor:
    found = torch.zeros(D_FF, dtype=torch.float64)
    for neuron, value in GROUPS[concept].items():
        found[neuron] = value
    return found


def examples(count: int = 80) -> list[dict[str, str]]:
    return [{"text": f"a{n % 7} {CONCEPTS[n % 4]}{n % 5} b{n % 11} c{n} {CONCEPTS[n % 4]}{n % 3}",
             "label": CONCEPTS[n % 4]} for n in range(count)]


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    given = {"name": "sea", "examples": examples(), "target": "sea", "layers": [0, 1], "features": 5, "share": 6 / D_FF,
             "restarts": 3, "iterations": 150, **fields}
    return prepare("snmf", parse_request("snmf", given), toy or GroupToy(), "test").run(silent, never)


def test_the_concepts_group_is_found_as_a_vector_with_the_spread_of_its_activity() -> None:
    found = extract(readout={"target": ["seaword"]})
    assert set(found.payload.layers) == {LAYER}
    vector = found.payload.layers[LAYER]["vector"]
    assert cosine(vector, group_of("sea")) > 0.98
    assert set(vector.nonzero().flatten().tolist()) <= set(GROUPS["sea"])
    assert float(vector.norm()) == pytest.approx(found.metadata.sigma[LAYER], rel=1e-4)
    card = found.metadata.card or {}
    assert found.report["test"]["auc"] == 1.0 and card["stability"] > 0.9
    assert found.report["effect"]["percentile"] == 100.0
    assert found.report["explained"] > 0.9 > max(found.report["explained_dealt"])
    assert (found.metadata.kind, found.metadata.op, found.metadata.site) == ("vector", "add", "mlp_act")
    assert "draft" not in card
    # The other concepts are among the groups as well, without a word about them.
    assert len(found.report["groups"]) == 5


def test_taking_the_group_out_takes_the_word_away() -> None:
    for form, op, kind in (("subspace", "ablate", "subspace"), ("neuron_set", "neuron_mask", "neuron_set")):
        found = extract(form=form, readout={"target": ["seaword"]})
        assert (found.metadata.kind, found.metadata.op) == (kind, op)
        assert found.report["effect"]["found"] > 1.0 and found.report["effect"]["percentile"] >= 95, form
        if form == "neuron_set":
            assert set(found.payload.layers[LAYER]["neurons"].tolist()) == set(GROUPS["sea"])


def test_several_groups_span_a_subspace() -> None:
    basis = extract(form="subspace", take=2).payload.layers[LAYER]["basis"]
    assert basis.shape == (2, D_FF)
    assert float((basis.double() @ group_of("sea")).norm() / group_of("sea").norm()) > 0.98


def test_a_model_without_groups_gives_no_better_than_random_ones() -> None:
    """The control: neurons that are never active together."""
    found = extract(GroupToy(planted=False), readout={"target": ["seaword"]})
    assert found.report["controls"]["random_groups"]["percentile"] < 97.5
    assert found.report["test"]["auc"] < 0.9
    assert found.metadata.card is not None and found.metadata.card["stability"] < 0.9


def test_equal_requests_make_equal_numbers() -> None:
    assert torch.equal(*(extract().payload.layers[LAYER]["vector"] for _ in range(2)))


def test_progress_rises_and_it_can_be_cancelled_while_it_factorises() -> None:
    told: list[tuple[float, str]] = []
    given = {"name": "sea", "examples": examples(), "target": "sea", "features": 5}
    prepared = prepare("snmf", parse_request("snmf", given), GroupToy(), "test")
    with pytest.raises(ExtractionCancelled):
        prepared.run(lambda share, stage: told.append((share, stage)), lambda: bool(told) and told[-1][0] > 0.35)
    assert told[-1][1] == "fit" and told == sorted(told, key=lambda one: one[0])


@pytest.mark.parametrize(("fields", "error", "param"), [
    ({"take": 2}, TrimtabError, "take"), ({"features": 400}, TooFewExamples, "features")])
def test_refusals(fields: dict[str, Any], error: type[Exception], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(**fields)
    assert param in str(caught.value) or getattr(caught.value, "param", None) == param


@pytest.mark.parametrize(("limit", "param"), [("MOST_WORK", "max_tokens"), ("MOST_USAGE", "max_tokens"),
                                              ("MOST_MEANS", "examples")])
def test_what_would_take_too_long_or_too_much_memory_is_refused_before_it_begins(
        monkeypatch: pytest.MonkeyPatch, limit: str, param: str) -> None:
    monkeypatch.setattr(snmf, limit, 100.0)
    toy = GroupToy()
    with pytest.raises(InvalidData) as caught:
        extract(toy)
    assert caught.value.param == param and toy.passes == 0
