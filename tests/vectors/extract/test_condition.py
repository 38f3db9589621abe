"""Conditions on a model with a planted direction: found with their threshold; dealt labels find nothing."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.artifacts.source import Resolved
from steering.language.intervention import Intervention
from steering.programs.compiler import compile_program
from steering.programs.reading import compile_reader
from tests.vectors.extract.toy import D_MODEL, Toy, cosine, never, noise, silent, unit
from vectors.artifact import Artifact
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods.condition import search
from vectors.extract.refusals import OneClass, TooFewExamples

LAYER = 1


class TopicToy(Toy):
    """Prompts on the planted topic carry a direction from block 1 on, which no word of theirs gives away."""

    def __init__(self, *, planted: bool = True) -> None:
        super().__init__()
        self.planted = planted

    def neurons(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        if layer != LAYER or not self.planted:
            return torch.zeros(len(ids), D_MODEL, dtype=torch.float64)
        # The last word is t<n>; even numbers are the topic.
        topic = int(self.said(ids)[-1][1:]) % 2 == 0
        push = 6.0 * unit("topic") if topic else torch.zeros(D_MODEL, dtype=torch.float64)
        return torch.linalg.lstsq(self.w_down[layer], push).solution.expand(len(ids), -1)

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.stack([noise("e", tuple(ids), n) for n in range(len(ids))])


def examples(count: int = 120) -> list[dict[str, Any]]:
    return [{"text": f"tell me about t{n}", "label": "topic" if n % 2 == 0 else f"other{n % 3}"} for n in range(count)]


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    given = {"name": "topic", "examples": examples(), "target": "topic", **fields}
    return prepare("condition", parse_request("condition", given), toy or TopicToy(), "test").run(silent, never)


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize(("form", "direction"), [("linear", "probe"), ("linear", "mean"), ("cosine", "mean")])
def test_a_planted_direction_is_found(form: str, direction: str, pool: str) -> None:
    found = extract(form=form, direction=direction, pool=pool)
    assert found.report["best_layer"] >= LAYER
    assert found.report["test"]["f1"] > 0.95
    numbers = found.payload.layers[found.report["best_layer"]]
    assert cosine(numbers["weight" if form == "linear" else "vector"], unit("topic")) > 0.8
    reading = found.metadata.reading
    assert reading is not None and (reading.form, reading.pool, reading.direction) == (form, pool, "above")
    controls = found.report["controls"]
    for name in ("shuffled_labels", "random_directions"):
        assert controls[name]["percentile"] >= 95 and controls[name]["mean"] < 0.85
    assert controls["bag_of_tokens"]["f1"] < 0.75, "no word gives the topic away"


def test_cast_finds_it_by_size() -> None:
    found = extract(form="cast")
    assert found.metadata.kind == "vector" and found.report["test"]["f1"] > 0.85
    assert found.report["controls"]["shuffled_labels"]["percentile"] >= 90


def test_without_a_topic_nothing_is_found() -> None:
    found = extract(TopicToy(planted=False))
    assert found.report["test"]["auc"] < 0.8
    assert found.report["controls"]["random_directions"]["percentile"] < 95


def test_the_artifact_is_a_gate_as_it_is() -> None:
    """The scores that the gate reads are those the threshold was found on."""
    toy = TopicToy()
    found = extract(toy)
    source = Artifact(found.metadata, 1, "d", 1, tuple(found.payload.layers), (), None  # type: ignore[arg-type]
                      ).to_source(found.payload)
    gate = {"op": "add", "layers": [0], "inline": {"vector": [1.0] * D_MODEL}, "gate": {"probe": "topic"}}
    program = compile_program([Resolved(Intervention.model_validate(gate), None, (source,))], toy.facts)
    layer = found.report["best_layer"]
    right = 0
    for n in range(200, 240):
        h = toy.capture([toy.encode(f"tell me about t{n}")], "resid_post", [layer], None)[0]
        right += program.gates[0].decide({"resid_post": h}).open is (n % 2 == 0)
    assert right >= 38
    reader = compile_reader(source, toy.facts)
    assert reader.form == "linear" and list(reader.layers) == [layer]


@pytest.mark.parametrize(("scores", "labels", "value", "side"), [
    ([0.0, 1.0, 5.0, 6.0], [0, 0, 1, 1], 3.0, "above"),
    ([0.0, 1.0, 5.0, 6.0], [1, 1, 0, 0], 3.0, "below"),
    ([0.0, 1.0, 2.0, 9.0], [0, 1, 0, 1], 0.5, "above"),
])
def test_threshold_search(scores: list[float], labels: list[int], value: float, side: str) -> None:
    found = search(torch.tensor(scores), torch.tensor(labels).bool(), ("above", "below"))
    assert found is not None and (found.value, found.side) == (pytest.approx(value), side)


def test_threshold_search_is_exhaustive() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(0, 8, (25,), generator=generator).double()
        labels = torch.rand(25, generator=generator) < 0.4
        best = 0.0
        for limit in [n + 0.5 for n in range(7)]:
            for opened in (scores > limit, scores < limit):
                hit = int((opened & labels).sum())
                best = max(best, 2 * hit / (int(opened.sum()) + int(labels.sum())))
        found = search(scores, labels, ("above", "below"))
        assert found is not None and found.f1 == pytest.approx(best)
    assert search(torch.ones(5), torch.ones(5).bool(), ("above",)) is None


@pytest.mark.parametrize(("fields", "error"), [
    ({"target": "nothing"}, OneClass), ({"examples": examples(8)}, TooFewExamples),
    ({"examples": [{**e, "label": "topic"} for e in examples()]}, OneClass)])
def test_bad_data(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        extract(**fields)
