"""EAST on an agent whose doubt is one direction of the stream."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.language.errors import TrimtabError
from tests.vectors.extract.toy import VOCAB, Toy, cosine, never, noise, silent, unit
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.refusals import EmptyText, FitFailed, LeakingSplit, NoContrast, OneClass, TooFewExamples

DOUBT = unit("doubt")


class Agent(Toy):
    """The word d3 in the history means doubt 3; the choice is the more even, the further the stream lies along DOUBT.
    With even=True it is always even; with deaf=True its doubt is not in the stream."""

    def __init__(self, *, even: bool = False, deaf: bool = False) -> None:
        super().__init__()
        self.even, self.deaf = even, deaf

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        h = torch.stack([0.2 * noise("e", tuple(ids), n) for n in range(len(ids))])
        if not self.deaf:
            h[-1] += self.doubt(ids) * DOUBT
        return h

    def doubt(self, ids: Sequence[int]) -> float:
        return float(next(word for word in self.said(ids) if word.startswith("d"))[1:])

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        logits = torch.full((VOCAB,), -10.0, dtype=torch.float64)
        along = self.doubt(ids) if self.deaf else float(resid @ DOUBT)
        gap = 0.0 if self.even else max(0.0, 4.0 - along)
        logits[self.token("A")], logits[self.token("B")] = gap, 0.0
        return logits


def prompts(episodes: int = 15, steps: int = 4) -> list[dict[str, Any]]:
    return [{"text": f"e{k} d{(k + 3 * t) % 4} step{t}", "episode": f"e{k}", "step": t}
            for k in range(episodes) for t in range(steps)]


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    given = {"name": "east", "prompts": prompts(), "actions": [" A", " B"], "strengths": [0.3, 0.6], "layers": [0, 1],
             **fields}
    request = parse_request("entropic_steering", given)
    return prepare("entropic_steering", request, toy or Agent(), "test").run(silent, never)


@pytest.mark.parametrize("center", ["episode", "step", "all"])
def test_the_planted_doubt_is_found_and_steers_both_ways(center: str) -> None:
    found = extract(center=center)
    for layer in (0, 1):
        assert cosine(found.payload.layers[layer]["vector"], DOUBT) > 0.9
    report = found.report
    assert report["test"]["correlation"] > 0.8
    by_strength = [(float(c), entry["entropy"]) for c, entry in report["test"]["entropy_by_strength"].items()]
    entropies = [entropy for _, entropy in sorted(by_strength)]
    assert entropies == sorted(entropies) and len(entropies) == 5
    assert entropies[0] < entropies[2] < entropies[4]
    for controls in report["controls"].values():
        for control in controls.values():
            assert control["draws"] == 20 and control["percentile"] >= 90
    assert found.metadata.strength.unit == "rel"
    # One unit of strength is as long as the stream itself.
    assert float(found.payload.layers[0]["vector"].norm()) == pytest.approx(found.metadata.residual_norm[0], rel=1e-5)


def test_doubt_that_is_not_in_the_stream_is_not_found() -> None:
    found = extract(Agent(deaf=True))
    assert abs(cosine(found.payload.layers[1]["vector"], DOUBT)) < 0.6
    assert abs(found.report["test"]["correlation"]) < 0.7
    assert found.report["controls"]["entropy_gain"]["random_vectors"]["found"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("fields", "toy", "error", "param"), [
    ({}, Agent(even=True), OneClass, "prompts"),
    ({"actions": [" A", " A lot"]}, Agent(), NoContrast, "actions"),
    ({"actions": [" C", " D"]}, Agent(), FitFailed, "actions"),
    ({"prompts": [{**prompt, "episode": f"x{n}"} for n, prompt in enumerate(prompts())]}, Agent(), NoContrast,
     "center"),
    ({"prompts": prompts(6)}, Agent(), TooFewExamples, "prompts"),
    ({"prompts": [*prompts(), {"text": " ", "episode": "e0"}]}, Agent(), EmptyText, "prompts[60].text"),
    ({"prompts": [{**prompt, "split": ("train", "dev", "test")[int(prompt["episode"][1:]) % 3]} for prompt in prompts()]
      + [{**prompts()[0], "episode": "other", "split": "test"}]}, Agent(), LeakingSplit, "prompts[60]"),
])
def test_what_cannot_work_is_refused(fields: dict[str, Any], toy: Toy, error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(toy, **fields)
    assert caught.value.param == param
