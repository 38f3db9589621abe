"""Experts on a mixture whose router is planted."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.language.errors import TrimtabError, UnsupportedSite
from tests.vectors.extract.toy import VOCAB, Toy, never, noise, silent
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.refusals import EmptyText, LeakingSplit, NoContrast, OneClass, TooFewExamples

NUM_EXPERTS = 12
PLANTED = {(0, 3), (1, 7), (2, 5)}
POPULAR = (1, 0)


class ExpertToy(Toy):
    """Prompts with the word "bad" lean to three planted experts; expert (1, 0) is popular with everyone."""

    def __init__(self, *, planted: bool = True) -> None:
        super().__init__(num_experts=NUM_EXPERTS, experts_per_token=3)
        self.planted = planted

    def router(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([noise("r", layer, tuple(ids), n, width=NUM_EXPERTS) for n in range(len(ids))])
        for planted_layer, expert in PLANTED:
            if planted_layer == layer and self.planted and "bad" in self.said(ids):
                logits[:, expert] += 1.5
        if layer == POPULAR[0]:
            logits[:, POPULAR[1]] += 5.0
        return logits

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(VOCAB, dtype=torch.float64)
        logits[self.token("no" if "bad" in self.said(ids) else "yes")] = 5.0
        return logits


def examples(count: int = 60, *, labels: bool = True) -> list[dict[str, Any]]:
    return [{"text": f"tell me {'bad' if n % 2 else 'good'} thing t{n}",
             **({"label": "shown" if n % 2 else "other"} if labels else {})} for n in range(count)]


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    given = {"name": "experts", "examples": examples(), "num_experts": 3, **fields}
    request = parse_request("tunable_experts", given)
    return prepare("tunable_experts", request, toy or ExpertToy(), "test").run(silent, never)


def chosen(found: Extraction) -> set[tuple[int, int]]:
    return {(layer, unit) for layer, numbers in found.payload.layers.items() for unit in numbers["experts"].tolist()}


@pytest.mark.parametrize("statistic", ["ftri", "risk_difference"])
def test_planted_experts_are_found_and_the_popular_one_is_not(statistic: str) -> None:
    found = extract(statistic=statistic)
    assert chosen(found) == PLANTED
    assert found.report["test"]["auc"] > 0.9
    card = found.metadata.card or {}
    assert card["dev"]["auc"] > 0.9 and card["test"]["auc"] == found.report["test"]["auc"]
    assert card["layers"] == sorted({layer for layer, _ in PLANTED})
    for control in found.report["controls"].values():
        assert control["draws"] == 20 and control["percentile"] >= 95
    assert (found.metadata.kind, found.metadata.op, found.metadata.options) == (
        "expert_set", "expert_mask", {"mode": "off"})


def test_labels_that_mean_nothing_give_nothing() -> None:
    found = extract(ExpertToy(planted=False))
    assert found.report["controls"]["matched_random"]["percentile"] < 97.5
    assert 0.1 < found.report["test"]["auc"] < 0.9
    assert 0.1 < found.report["dev"]["auc"] < 0.9, "dev is not fitted to"
    assert found.report["controls"]["shuffled_labels"]["percentile"] < 97.5


def test_the_models_own_answer_may_be_the_label() -> None:
    by_answer = extract(examples=examples(labels=False), markers=["no"], max_tokens=1)
    assert chosen(by_answer) == PLANTED
    assert by_answer.report["target_share"] == 0.5


def test_demoted_experts_are_others_and_a_layer_can_be_capped() -> None:
    assert not chosen(extract(direction="demoted")) & PLANTED
    capped = extract(num_experts=6, per_layer=2, mode="force")
    assert chosen(capped) >= PLANTED
    assert max(len(numbers["experts"]) for numbers in capped.payload.layers.values()) == 2


@pytest.mark.parametrize(("given", "error", "param"), [
    ([{"text": f"t{n}", "label": "shown"} for n in range(40)], OneClass, "examples"),
    ([{"text": f"t{n}", "label": "other"} for n in range(40)], OneClass, "examples"),
    ([*examples(), {"text": " ", "label": "other"}], EmptyText, "examples[60].text"),
    (examples(6), TooFewExamples, "examples"),
    ([*examples(), {**examples()[0], "label": "shown"}], NoContrast, "examples[60]"),
    ([*examples(), examples()[0]], LeakingSplit, "examples[60]"),
])
def test_bad_data_is_refused(given: list[dict[str, Any]], error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(examples=given)
    assert caught.value.param == param


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(UnsupportedSite):
        extract(Toy())


def test_only_the_last_tokens_choice_counts_where_asked() -> None:
    class LastToy(ExpertToy):
        """Expert (2, 9) is chosen at the last token of prompts with "bad", and one token before it by the others."""

        def router(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
            logits = torch.stack([noise("r", layer, tuple(ids), n, width=NUM_EXPERTS) for n in range(len(ids))])
            if layer == 2:
                logits[-1 if "bad" in self.said(ids) else -2, 9] += 20.0
            return logits

    last = extract(LastToy(), num_experts=1, position="last")
    assert chosen(last) == {(2, 9)}
    assert last.report["test"]["auc"] > 0.8
    assert last.report["controls"]["shuffled_labels"]["percentile"] >= 97.5  # dealt labels may hit it once
    (everywhere,) = extract(LastToy(), num_experts=1).report["experts"]
    assert everywhere["fit"] < 0.5 < last.report["experts"][0]["fit"]
