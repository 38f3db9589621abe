"""Neurons on a model some of whose units hear one relation and write its answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from steering.language.errors import TrimtabError
from tests.vectors.extract.toy import D_FF, VOCAB, Toy, never, noise, silent
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods.relation_neurons import average_precision
from vectors.extract.refusals import EmptyText, LeakingSplit, NoContrast, OneClass, TextTooLong

PLANTED = {(0, 4), (1, 9), (1, 20)}
LOUD = (2, 11)


class FactToy(Toy):
    """Planted units fire on "capital", whose answers they carry; unit (2, 11) is loud on everything."""

    def __init__(self, *, planted: bool = True) -> None:
        super().__init__()
        self.planted = planted

    def neurons(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        out = torch.stack([noise("n", layer, tuple(ids), n, width=D_FF).abs() for n in range(len(ids))]) * 0.1
        for planted_layer, unit in PLANTED if self.planted else ():
            if planted_layer == layer:
                out[:, unit] += torch.tensor([2.0 if word == "capital" else 0.0 for word in self.said(ids)])
        if layer == LOUD[0]:
            out[:, LOUD[1]] += 3.0
        return out

    def forward(self, ids: Any, program: Any, prompt_length: int, seen: Any) -> torch.Tensor:
        logits = super().forward(ids, program, prompt_length, seen)
        words = self.said(ids)
        fired = min(float(seen["mlp_act", layer][:, unit].max()) for layer, unit in PLANTED)
        known = fired > 1.0 if "capital" in words else True
        logits[self.token(f"answer{words[-1]}")] = 5.0 if known else -5.0
        return logits

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        return torch.zeros(VOCAB, dtype=torch.float64)


def facts(count: int = 45) -> list[dict[str, Any]]:
    relations = ("capital", "river", "king")
    return [{"text": f"the {relations[n % 3]} of e{n}", "label": relations[n % 3], "answer": f" answere{n}"}
            for n in range(count)]


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    given = {"name": "neurons", "facts": facts(), "target": "capital", "share": 3 / (3 * D_FF), **fields}
    request = parse_request("relation_neurons", given)
    return prepare("relation_neurons", request, toy or FactToy(), "test").run(silent, never)


def chosen(found: Extraction) -> set[tuple[int, int]]:
    return {(layer, unit) for layer, numbers in found.payload.layers.items() for unit in numbers["neurons"].tolist()}


def test_planted_units_are_found_and_the_loud_one_is_not() -> None:
    found = extract()
    assert chosen(found) == PLANTED
    card = found.metadata.card or {}
    assert card["dev"] == card["test"] == {"average_precision": 1.0}
    for control in found.report["controls"].values():
        assert control["draws"] == 20 and control["percentile"] == 100.0
    assert (found.metadata.kind, found.metadata.op, found.metadata.options) == (
        "neuron_set", "neuron_mask", {"mode": "zero"})


def test_without_them_the_relation_fails_and_others_do_not() -> None:
    effect = extract().report["effect"]
    assert (effect["before"]["target"], effect["before"]["others"]) == (1.0, 1.0)
    assert (effect["after"]["target"], effect["after"]["others"]) == (0.0, 1.0)
    assert effect["target_logprob_drop"]["percentile"] == 100.0
    assert effect["others_logprob_drop"]["found"] == pytest.approx(0.0, abs=1e-6)
    assert effect["target_drop"]["percentile"] == 100.0
    assert effect["target_drop"]["max"] == 0.0


def test_units_that_hear_nothing_are_at_chance() -> None:
    given = [{key: value for key, value in fact.items() if key != "answer"} for fact in facts()]
    found = extract(FactToy(planted=False), facts=given)
    assert "effect" not in found.report
    assert found.report["test"]["average_precision"] < 0.75
    assert found.report["dev"]["average_precision"] < 0.75, "dev is not fitted to"
    assert found.report["controls"]["shuffled_labels"]["percentile"] < 97.5


def test_average_precision_is_that_of_scikit_learn() -> None:
    scores = np.random.default_rng(0).integers(0, 6, size=(40, 30)).astype(float)
    labels = np.random.default_rng(1).integers(0, 2, size=40)
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    expected = [average_precision_score(labels, scores[:, n]) for n in range(30)]
    assert np.allclose(found.numpy(), expected, atol=1e-12)


def test_both_ends_of_the_ranking_can_be_taken() -> None:
    found = extract(which="both", share=4 / (3 * D_FF), pooling="mean")
    assert len(chosen(found)) == 4 and len(chosen(found) & PLANTED) == 2


@pytest.mark.parametrize(("given", "error", "param"), [
    ([{"text": f"t{n}", "label": "capital"} for n in range(40)], OneClass, "facts"),
    ([*facts(), {"text": "", "label": "river", "answer": "x"}], EmptyText, "facts[45].text"),
    ([*facts(), {"text": "a b", "label": "river"}], EmptyText, "facts[45].answer"),
    ([*facts(), {"text": "a " * 300, "label": "river"}], TextTooLong, "facts[45].text"),
    ([*facts(), {**facts()[0], "label": "river"}], NoContrast, "facts[45]"),
    ([*facts(), facts()[0]], LeakingSplit, "facts[45]"),
])
def test_bad_data_is_refused(given: list[dict[str, Any]], error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(facts=given)
    assert caught.value.param == param
