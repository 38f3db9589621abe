"""The selection rule on a model that refuses along one direction, written at one layer only."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.language.errors import TrimtabError
from tests.vectors.extract.toy import HEAD_DIM, NUM_HEADS, VOCAB, Toy, cosine, never, noise, silent
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods import refusal_direction
from vectors.extract.refusals import EmptyText, LeakingSplit, NoContrast, TooFewPairs


class Refuser(Toy):
    """Head 1 of block 0 writes the direction at the last token of "bad" prompts; a decoy that differs as much, and
    that nothing reads, stands at the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 5 * noise("refuse", width=HEAD_DIM)
        self.direction = self.w_o[0][:, HEAD_DIM:2 * HEAD_DIM] @ self.written

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.stack([0.3 * noise("e", tuple(ids), n) for n in range(len(ids))])

    def heads(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(ids), NUM_HEADS * HEAD_DIM, dtype=torch.float64)
        if layer == 0 and "bad" in self.said(ids):
            out[-1, HEAD_DIM:2 * HEAD_DIM] = self.written
            out[-2, :HEAD_DIM] = 5 * noise("decoy", width=HEAD_DIM)
        return out

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        logits = 0.05 * (noise("words", width=VOCAB * 32).view(VOCAB, 32) @ resid)
        logits[self.token("Sorry")] = 16 * float(resid @ self.direction / self.direction.norm() ** 2) - 4
        return logits


def pairs(count: int = 40) -> list[dict[str, Any]]:
    return [{"positive": f"do t{n} bad now please", "negative": f"do t{n} good now please"} for n in range(count)]


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    given = {"name": "refusal", "pairs": pairs(), "readout": {"target": [" Sorry"]}, "max_kl": 0.5, "max_eval": 4,
             **fields}
    request = parse_request("refusal_direction", given)
    return prepare("refusal_direction", request, toy or Refuser(), "test").run(silent, never)


def test_the_direction_that_acts_is_chosen_and_the_decoy_is_not() -> None:
    toy = Refuser()
    found = extract(toy)
    report = found.report
    assert report["best_position"] == -1 and report["best_layer"] in (1, 2)
    assert cosine(found.payload.layers[report["best_layer"]]["vector"], toy.direction) > 0.95
    test = report["test"]
    assert test["positive_log_odds"] > 1 > -1 > test["positive_ablated"]
    assert test["negative_log_odds"] < -1 and test["negative_induced"] > 1
    chosen = next(c for c in report["candidates"] if (c["layer"], c["position"]) == (report["best_layer"], -1))
    assert (found.metadata.card or {})["dev"] == {
        "positive_ablated": chosen["ablated"], "negative_induced": chosen["induced"], "negative_kl": chosen["kl"]}
    for control in report["controls"].values():
        assert control["draws"] == 20 and control["percentile"] >= 95
    decoys = [c for c in report["candidates"] if c["position"] == -2]
    assert decoys and not any(c["allowed"] for c in decoys)


def test_the_artifact_is_ablated_everywhere_or_clamped_at_its_layer() -> None:
    ablate = extract().metadata
    assert ablate.op == "ablate" and ablate.layers is None
    assert ablate.options == {"multi_site": True, "source_layer": ablate.provenance["report"]["best_layer"]}
    clamp = extract(op="clamp")
    layer = clamp.report["best_layer"]
    assert clamp.metadata.op == "clamp" and clamp.metadata.layers == [layer]
    # Negative prompts have nothing of the direction.
    value = clamp.metadata.options["value"]
    assert isinstance(value, float) and abs(value) < 0.2 * float(clamp.payload.layers[layer]["vector"].norm())


def test_a_behaviour_that_nothing_brings_about_ends_as_a_draft_that_says_why() -> None:
    shuffled = [pair if n % 2 else {"positive": pair["negative"], "negative": pair["positive"]}
                for n, pair in enumerate(pairs())]
    for found in (extract(readout={"target": [" never"]}), extract(pairs=shuffled, max_eval=8)):
        card = found.metadata.card or {}
        assert "none of" in card["draft"] and f"draft: {card['draft']}" in card["warnings"]
        assert not any(candidate["allowed"] for candidate in found.report["candidates"])


def test_few_prompts_say_which_of_many_candidates_are_worth_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = extract()
    monkeypatch.setattr(refusal_direction, "MOST_CANDIDATES", 2)
    monkeypatch.setattr(refusal_direction, "FINALISTS", 2)
    narrowed = extract()
    assert len(narrowed.report["candidates"]) == 2 < len(everything.report["candidates"])
    for name in ("best_layer", "best_position", "test"):
        assert narrowed.report[name] == everything.report[name]


@pytest.mark.parametrize(("given", "error", "param"), [
    ([*pairs(), {"positive": "a b c", "negative": " "}], EmptyText, "pairs[40].negative"),
    ([*pairs(), {"positive": "a b c", "negative": "a b c"}], NoContrast, "pairs[40]"),
    ([*pairs(), pairs()[0]], LeakingSplit, "pairs[40]"),
    (pairs(6), TooFewPairs, "pairs"),
])
def test_bad_pairs_are_refused(given: list[dict[str, Any]], error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(pairs=given)
    assert caught.value.param == param
