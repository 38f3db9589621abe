"""The plane of a behaviour that a model reads along one direction, turned to and from it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.language.errors import TrimtabError
from tests.vectors.extract.toy import Toy, cosine, never, noise, silent, unit
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods.angular_steering import plane_of
from vectors.extract.refusals import EmptyText, LeakingSplit, NoContrast, TooFewPairs


class Turned(Toy):
    """"bad" prompts lie along one direction, "good" ones against it, a little further at every layer, and off it by an
    amount that every prompt has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.direction, self.drift = unit("behaviour"), unit("drift")

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        h = torch.stack([0.25 * noise("e", tuple(ids), n) for n in range(len(ids))])
        side = 1.0 if "bad" in self.said(ids) else -1.0
        h[-1] += side * (3.0 * self.direction + self.drift)
        return h

    def heads(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        out = super().heads(layer, ids, resid)
        side = 1.0 if "bad" in self.said(ids) else -1.0
        out[-1] = 0.05 * side * noise("later", layer)
        return out

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        logits = super().read(ids, resid)
        logits[self.token("Sorry")] = 2.0 * float(resid @ self.direction) + 6.0
        return logits


def pairs(count: int = 30) -> list[dict[str, Any]]:
    return [{"positive": f"do t{n} bad", "negative": f"do t{n} good"} for n in range(count)]


def extract(**fields: Any) -> Extraction:
    given = {"name": "turned", "pairs": pairs(), "readout": {"target": ["Sorry"]}, "max_eval": 2, "layers": [0, 1],
             "angles": [0, 90, 180, 270], **fields}
    return prepare("angular_steering", parse_request("angular_steering", given), Turned(), "test").run(silent, never)


def test_the_plane_holds_the_behaviour_and_turns_it_both_ways() -> None:
    found = extract()
    report, layer = found.report, found.report["best_layer"]
    basis = found.payload.layers[layer]["basis"]
    assert torch.allclose(basis @ basis.T, torch.eye(2), atol=1e-5)
    assert cosine(basis[0], 3.0 * Turned().direction + Turned().drift) > 0.9
    assert (report["angle_up"], report["angle_down"]) == (0, 180)
    assert report["test"]["up"] > report["test"]["log_odds"] > report["test"]["down"]
    for control in report["controls"].values():
        assert control["draws"] == 20 and control["percentile"] >= 95
    assert (found.metadata.kind, found.metadata.op) == ("subspace", "rotate")
    assert found.metadata.options == {"angle": 180, "adaptive": False}
    # One plane, at every layer from its source on.
    assert list(found.payload.layers) == list(range(layer, 2))
    assert all(torch.equal(numbers["basis"], basis) for numbers in found.payload.layers.values())


def test_dealt_labels_make_no_plane_of_the_behaviour() -> None:
    dealt = [pair if n % 2 else {"positive": pair["negative"], "negative": pair["positive"]}
             for n, pair in enumerate(pairs(60))]
    report = extract(pairs=dealt).report
    assert report["controls"]["shuffled_labels"]["percentile"] < 95


def test_the_second_axis_is_perpendicular_and_follows_the_layers() -> None:
    one, two = unit("one"), unit("two")
    base = torch.stack([noise("base", n) for n in range(10)])
    rows = {0: torch.stack([base + one, base]), 1: torch.stack([base + one + two, base]),
            2: torch.stack([base + one + 3 * two, base])}
    plane = plane_of(rows, 0, torch.ones(10, dtype=torch.float64))
    assert plane is not None
    rest = two - (two @ plane[0]) * plane[0]
    assert cosine(plane[0], one) == pytest.approx(1.0)
    assert abs(float(plane[0] @ plane[1])) < 1e-9
    assert abs(cosine(plane[1], rest)) > 0.95
    assert plane_of({0: torch.stack([base, base])}, 0, torch.ones(10, dtype=torch.float64)) is None


def test_one_layer_takes_the_second_axis_from_the_pairs() -> None:
    spread, one = unit("spread"), unit("one")
    base = torch.stack([noise("base", n) for n in range(12)])
    amount = torch.linspace(-2, 2, 12, dtype=torch.float64).unsqueeze(1)
    plane = plane_of({0: torch.stack([base + one + amount * spread, base])}, 0, torch.ones(12, dtype=torch.float64))
    assert plane is not None
    assert abs(cosine(plane[1], spread - (spread @ one) * one)) > 0.99


@pytest.mark.parametrize(("given", "error", "param"), [
    ([*pairs(), {"positive": "a b c", "negative": " "}], EmptyText, "pairs[30].negative"),
    ([*pairs(), {"positive": "a b c", "negative": "a b c"}], NoContrast, "pairs[30]"),
    ([*pairs(), {**pairs()[0], "item": "other"}], LeakingSplit, "pairs[30]"), (pairs(6), TooFewPairs, "pairs"),
])
def test_bad_pairs_are_refused(given: list[dict[str, Any]], error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(pairs=given)
    assert caught.value.param == param
