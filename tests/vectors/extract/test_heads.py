"""Both head methods on a model two of whose heads carry the concept to the answer."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.language.errors import TrimtabError
from tests.vectors.extract.toy import HEAD_DIM, NUM_HEADS, VOCAB, Toy, cosine, never, noise, silent, unit
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.refusals import EmptyText, LeakingSplit, NoContrast, TooFewExamples

PLANTED = [(1, 2), (2, 0)]


def part(head: int) -> slice:
    return slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)


class HeadToy(Toy):
    """The planted heads write + or - their direction for up and down texts, and the answer is read from what both
    wrote; `planted` False: they write the same for both."""

    def __init__(self, *, planted: bool = True) -> None:
        super().__init__()
        self.planted = planted
        self.directions = {key: 3 * unit("concept", *key, width=HEAD_DIM) for key in PLANTED}

    def heads(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        out = torch.stack([noise("h", layer, tuple(ids), n, width=NUM_HEADS * HEAD_DIM) for n in range(len(ids))])
        for key, direction in self.directions.items():
            if key[0] == layer:
                up = 1.0 if not self.planted or "up" in self.said(ids) else -1.0
                out[-1, part(key[1])] += up * direction
        return out

    def forward(self, ids: Any, program: Any, prompt_length: int, seen: Any) -> torch.Tensor:
        logits = super().forward(ids, program, prompt_length, seen)
        written = sum(float(seen["head_out", layer][-1, part(head)] @ d / d.norm() ** 2)
                      for (layer, head), d in self.directions.items())
        logits[self.token("yes")], logits[self.token("no")] = 3 * written, -3 * written
        return logits

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        return torch.zeros(VOCAB, dtype=torch.float64)


def shift(toy: Toy | None = None, count: int = 40, **fields: Any) -> Extraction:
    pairs = [{"positive": f"t{n} up", "negative": f"t{n} down"} for n in range(count)]
    given = {"name": "heads", "pairs": pairs, "share": 2 / 12, "readout": {"target": [" yes"], "others": [" no"]},
             **fields}
    return prepare("head_shift", parse_request("head_shift", given), toy or HeadToy(), "test").run(silent, never)


def examples(count: int = 40) -> list[dict[str, Any]]:
    return [{"text": f"t{n} {('up', 'down')[n % 2]}", "answer": (" yes", " no")[n % 2]} for n in range(count)]


def ablation(toy: Toy | None = None, **fields: Any) -> Extraction:
    given = {"name": "heads", "examples": examples(), "num_heads": 2, **fields}
    return prepare("head_ablation", parse_request("head_ablation", given), toy or HeadToy(), "test").run(silent, never)


def chosen(found: Extraction) -> list[tuple[int, int]]:
    return [(layer, head) for layer, numbers in found.payload.layers.items() for head in numbers["heads"].tolist()]


@pytest.mark.parametrize("direction", ["mean", "probe"])
def test_planted_heads_and_their_direction_are_found(direction: str) -> None:
    toy = HeadToy()
    found = shift(toy, direction=direction)
    assert chosen(found) == PLANTED
    for layer, head in PLANTED:
        assert cosine(found.payload.layers[layer]["shift"][0], toy.directions[layer, head]) > 0.85
    assert found.report["test"]["accuracy"] > 0.9
    for control in found.report["controls"].values():
        assert control["draws"] == 20 and control["percentile"] >= 95
    effect = found.report["effect"]
    assert effect["log_odds_before"] < 0 < effect["toward"]["found"]
    assert effect["toward"]["percentile"] >= 95 and effect["toward_vs_other_heads"]["percentile"] >= 95
    assert effect["away"] < 0


def test_one_sigma_is_the_spread_of_the_heads_output() -> None:
    toy = HeadToy()
    length = float(shift(toy).payload.layers[1]["shift"][0].norm())
    # Two classes three apart from the middle, and noise of one.
    assert length == pytest.approx((3**2 + 1) ** 0.5, rel=0.25)


def test_heads_that_do_not_tell_are_at_chance() -> None:
    found = shift(HeadToy(planted=False), readout=None)
    assert "effect" not in found.report
    assert found.report["test"]["accuracy"] < 0.85
    assert found.report["controls"]["shuffled_labels"]["percentile"] <= 97.5


def test_heads_whose_loss_costs_the_answer_are_found() -> None:
    found = ablation()
    assert chosen(found) == PLANTED
    assert found.metadata.card is not None
    for split in ("dev", "test"):
        assert found.metadata.card[split]["accuracy"] == 1.0
        assert found.metadata.card[split]["accuracy_without"] < 0.2
    control = found.report["controls"]["random_heads"]
    assert control["logprob_drop"]["percentile"] == 100.0 and control["logprob_drop"]["draws"] == 20
    assert found.metadata.options == {"mode": "scale", "scale": 0.0}
    assert found.metadata.card["random_percentile"] == 100.0


def test_where_no_head_matters_none_costs_anything() -> None:
    class Deaf(HeadToy):
        def forward(self, ids: Any, program: Any, prompt_length: int, seen: Any) -> torch.Tensor:
            Toy.forward(self, ids, program, prompt_length, seen)
            return noise("said", tuple(ids), width=VOCAB).clone()

    found = ablation(Deaf())
    assert found.report["controls"]["random_heads"]["logprob_drop"]["percentile"] == 50.0


@pytest.mark.parametrize(("given", "error", "param"), [
    ([*examples(), {"text": "", "answer": " yes"}], EmptyText, "examples[40].text"),
    ([*examples(), {"text": "x", "answer": " "}], EmptyText, "examples[40].answer"),
    ([*examples(), examples()[3]], LeakingSplit, "examples[40]"),
    ([{**example, "answer": " yes"} for example in examples()], NoContrast, "examples"),
    (examples(6), TooFewExamples, "examples"),
])
def test_bad_examples_are_refused(given: list[dict[str, Any]], error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        ablation(examples=given)
    assert caught.value.param == param


def test_bad_pairs_and_readouts_are_refused() -> None:
    same = {"positive": "a b", "negative": "a b"}
    with pytest.raises(NoContrast) as caught:
        shift(pairs=[same] * 12)
    assert caught.value.param == "pairs[0]"
    with pytest.raises(NoContrast) as caught:
        shift(readout={"target": [" yes sir"], "others": [" yes madam"]})
    assert caught.value.param == "readout.others"
