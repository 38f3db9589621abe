"""Planted rings, sequences and grids are recovered, with what the model answers on them; shuffled labels are not."""

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from steering.artifacts.spline import Manifold
from steering.language.errors import InvalidRequest, TrimtabError
from steering.language.scope import PromptSelection, Scope
from tests.sweeps import sweep_of
from tests.vectors.extract.toy import VOCAB, Toy, never, noise, silent
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.behaviour import Answers, Behaviour, bhattacharyya
from vectors.extract.manifold_fit import Layout, chosen_pairs, cycle_angles
from vectors.extract.manifold_trial import sign_flip_p
from vectors.extract.programs import program_of
from vectors.extract.refusals import AnswerInPrompt, NoContrast, OneClass, TooFewExamples

DAYS = [f"day{n}" for n in range(7)]
GRID = {f"node{x}{y}": [float(x), float(y)] for x, y in itertools.product(range(3), range(3))}
PLANE = torch.linalg.qr(torch.stack([noise("plane", n) for n in range(3)]).T).Q.T


def on_ring(value: str) -> torch.Tensor:
    angle = 2 * math.pi * int(value[-1]) / 7
    return torch.tensor([4 * math.cos(angle), 4 * math.sin(angle), 0.0], dtype=torch.float64)


def on_arc(value: str) -> torch.Tensor:
    angle = 0.5 * int(value[-1])
    return torch.tensor([4 * math.cos(angle), 4 * math.sin(angle), 0.3 * angle], dtype=torch.float64)


def on_grid(value: str) -> torch.Tensor:
    x, y = GRID[value]
    return torch.tensor([2.5 * x, 2.5 * y, 0.4 * (x - 1) ** 2], dtype=torch.float64)


class PlaceToy(Toy):
    """The last token lies on its value's point; answers go by the distance to every value's point."""

    def __init__(self, point: Any, values: Sequence[str]) -> None:
        super().__init__()
        self.points = {value: point(value) for value in values}

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        h = torch.stack([noise("e", tuple(ids), n) for n in range(len(ids))])
        value = next((word for word in self.said(ids) if word in self.points), None)
        outside = h[-1] - (h[-1] @ PLANE.T) @ PLANE
        h[-1] = 0.5 * outside + 0.15 * (h[-1] @ PLANE.T) @ PLANE
        if value is not None:
            h[-1] += self.points[value] @ PLANE
        return h

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        logits = torch.full((VOCAB,), -12.0, dtype=torch.float64)
        for value, point in self.points.items():
            logits[self.token(value)] = -0.9 * float((resid @ PLANE.T - point).square().sum())
        return logits


def examples(values: Sequence[str], count: int = 10) -> list[dict[str, Any]]:
    return [{"text": f"c{n} said {value} then", "label": value} for value in values for n in range(count)]


def extract(toy: Toy, **fields: Any) -> Extraction:
    given = {"name": "places", "layers": [1], "rank": 3, "steps": 5, "max_eval": 1, "max_pairs": 6, **fields}
    return prepare("manifold", parse_request("manifold", given), toy, "test").run(silent, never)


def manifold_of(found: Extraction, layer: int = 1) -> tuple[Manifold, torch.Tensor, torch.Tensor]:
    numbers = found.payload.layers[layer]
    made = Manifold.build(numbers["knots"], numbers["points"], numbers["period"])
    return made, numbers["basis"].double(), numbers["mean"].double()


@cache
def planted(kind: str) -> Extraction:
    """One extraction serves all tests of a case."""
    point, values, layout = CASES[IDS.index(kind)]
    return extract(PlaceToy(point, values), examples=examples(values), **layout)


CASES = [(on_ring, DAYS, {"layout": "cyclic", "order": DAYS}), (on_arc, DAYS, {"layout": "sequential", "order": DAYS}),
         (on_grid, list(GRID), {"layout": "graph", "coordinates": GRID})]
IDS = ["ring", "sequence", "grid"]


@pytest.mark.parametrize("kind", sweep_of("ring", slow=["sequence", "grid"]))
def test_what_was_planted_is_recovered(kind: str) -> None:
    (point, values, _), found = CASES[IDS.index(kind)], planted(kind)
    made, basis, mean = manifold_of(found)
    assert found.metadata.options == {"labels": values} and found.metadata.layers == [1]
    # The subspace is the planted one, and knot n lies on the point of value n.
    assert float((basis @ PLANE[:2].T).square().sum()) > 1.85
    there = made.at(made.knots) @ basis + mean
    for n, value in enumerate(values):
        assert float((there[n] @ PLANE.T - point(value)).norm()) < 0.4
    report = found.report
    assert report["test"]["swap"] == 1.0 and report["test"]["answered"] == 1.0
    assert report["controls"]["shuffled_labels"]["percentile"] == 100.0
    assert report["controls"]["random_subspaces"]["percentile"] == 100.0
    assert report["layers"]["1"]["order_p"] < 0.01
    assert found.metadata.card is not None
    assert found.metadata.scope == Scope(prompt=PromptSelection(positions=[-1]), generation="none")


def test_between_two_values_of_a_ring_lies_the_ring() -> None:
    found = planted("ring")
    made, basis, mean = manifold_of(found)
    halfway = made.at(made.from_places(torch.tensor([1.5]))) @ basis + mean
    angle = 2 * math.pi * 1.5 / 7
    expected = torch.tensor([4 * math.cos(angle), 4 * math.sin(angle), 0.0], dtype=torch.float64)
    assert float((halfway[0] @ PLANE.T - expected).norm()) < 0.5
    energy = found.report["energy"]
    assert energy["far"]["manifold"] < 0.3 * energy["far"]["chord"]
    assert energy["far"]["manifold"] < 0.3 * energy["far"]["shuffled_knots"]
    assert set(energy["by_distance"]) == {"1", "2", "3"}
    walk = found.report["walk"]
    steps = torch.tensor(walk["manifold"])
    # Values in between have their turn, one after the other.
    assert [int(n) for n in dict.fromkeys(steps.argmax(dim=1).tolist())] == _between(walk["source"], walk["target"])


def _between(source: str, target: str) -> list[int]:
    a, b = DAYS.index(source), DAYS.index(target)
    step = 1 if (b - a) % 7 <= 3 else -1
    return [(a + step * n) % 7 for n in range(min((b - a) % 7, (a - b) % 7) + 1)]


def test_the_artifact_moves_the_answer_by_label_place_and_shift() -> None:
    toy, found = PlaceToy(on_ring, DAYS), planted("ring")
    prompts = [toy.encode(f"new said {day} then") for day in DAYS]

    def answers(**options: Any) -> list[str]:
        program = program_of(toy.facts, "manifold", "manifold", "resid_post", found.payload.layers,
                             options={"labels": DAYS, **options})
        return [toy.said([int(row.argmax())])[0] for row in toy.next_logprobs(prompts, program)]

    assert answers(target="day4") == ["day4"] * 7
    assert answers(target=4.2) == ["day4"] * 7
    assert answers(shift=2) == [DAYS[(n + 2) % 7] for n in range(7)]
    assert answers(shift=-1, keep_offset=True) == [DAYS[n - 1] for n in range(7)]
    assert answers(target="day3", fraction=0.0) == DAYS
    assert answers(target="day3", source="day1", fraction=0.5) == ["day2"] * 7


@pytest.mark.parametrize("kind", sweep_of("ring", slow=["sequence", "grid"]))
def test_shuffled_labels_give_nothing(kind: str) -> None:
    point, values, layout = CASES[IDS.index(kind)]
    given = examples(values)
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(3)).tolist()
    dealt = [{**entry, "label": given[n]["label"]} for entry, n in zip(given, order, strict=True)]
    card = extract(PlaceToy(point, values), examples=dealt, **layout).metadata.card or {}
    assert "in their order" in card["draft"] and f"draft: {card['draft']}" in card["warnings"]


def test_what_cannot_work_is_refused_before_the_model_is_asked() -> None:
    """Eight prompts about weekdays, an order that luck makes, a prompt behind its answer: nothing is read for it."""
    class Unasked(PlaceToy):
        def capture(self, *given: Any, **more: Any) -> Any:
            raise AssertionError("the model was asked")

        next_logprobs = capture

    eight = [{"text": f"c{n} then {DAYS[n % 7]} and", "label": DAYS[n % 7]} for n in range(8)]
    ends = [*examples(DAYS), {"text": "c99 said day3", "label": "day3"}]
    for fields in ({"examples": eight, "order": DAYS}, {"examples": ends, "order": DAYS},
                   {"examples": examples(DAYS[:4]), "order": DAYS[:4], "layout": "sequential"}):
        request = parse_request("manifold", {"name": "places", "layout": "cyclic", **fields})
        with pytest.raises(InvalidRequest):
            prepare("manifold", request, Unasked(on_ring, DAYS), "test")


def test_prompts_that_hold_their_answer_bring_a_warning() -> None:
    given = {"layout": "cyclic", "order": DAYS}
    assert any("hold their own answer" in warning
               for warning in extract(PlaceToy(on_ring, DAYS), examples=examples(DAYS), **given).report["warnings"])


def test_a_ring_whose_values_are_named_out_of_order_is_not_theirs() -> None:
    wrong = [DAYS[3 * n % 7] for n in range(7)]
    card = extract(PlaceToy(on_ring, DAYS), examples=examples(DAYS), layout="cyclic", order=wrong).metadata.card or {}
    assert "in their order" in card["draft"]


def test_angles_rise_with_the_labels_in_either_direction_and_on_an_ellipse() -> None:
    angle = torch.arange(6, dtype=torch.float64) * math.pi / 3 + 0.4
    flat = torch.stack([5 * angle.cos(), angle.sin()], dim=1)
    for points in (flat, flat.flip(0)):
        found = cycle_angles(points)
        assert found is not None
        assert found.tolist() == pytest.approx([n * math.pi / 3 for n in range(6)], abs=1e-6)
    assert cycle_angles(flat[[0, 2, 1, 3, 4, 5]]) is None


def test_the_behaviour_manifold_passes_through_natural_answers() -> None:
    layout = Layout("cyclic", torch.arange(4.0, dtype=torch.float64).unsqueeze(1),
                    torch.tensor([4.0], dtype=torch.float64))
    natural = torch.tensor([[0.7, 0.1, 0.05, 0.1, 0.05], [0.1, 0.7, 0.1, 0.05, 0.05], [0.05, 0.1, 0.7, 0.1, 0.05],
                            [0.1, 0.05, 0.1, 0.7, 0.05]], dtype=torch.float64)
    made = Behaviour.fit(natural, torch.arange(4), layout)
    assert torch.allclose(made.curve.sum(dim=1), torch.ones(1000, dtype=torch.float64))
    assert float(made.distance(natural).max()) < 1e-6
    mixture = (natural[0] + natural[1]) / 2
    across = (natural[0] + natural[2]) / 2
    near, far = made.distance(torch.stack([mixture, across])).tolist()
    assert near < 0.3 * far
    assert made.nearest_value(natural).tolist() == [0, 1, 2, 3]
    p, q = natural[:1], natural[1:2]
    hellinger = float((p.sqrt() - q.sqrt()).norm()) / math.sqrt(2)
    assert float(bhattacharyya(p, q)) == pytest.approx(-math.log(1 - hellinger**2))
    assert float(bhattacharyya(torch.eye(2)[:1], torch.eye(2)[1:])) == pytest.approx(-math.log(1e-7), rel=1e-5)


def test_answers_sum_spellings_and_keep_the_rest() -> None:
    answers = Answers.make([[5, 9], [7]])
    logprobs = torch.log(torch.tensor([[0.2, 0.3, 0.1]]))
    assert answers.distribution(logprobs)[0].tolist() == pytest.approx([0.5, 0.1, 0.4])


def test_pairs_are_alike_at_every_distance() -> None:
    layout = Layout("cyclic", torch.arange(12.0, dtype=torch.float64).unsqueeze(1),
                    torch.tensor([12.0], dtype=torch.float64))
    pairs = chosen_pairs(layout, 12, torch.Generator().manual_seed(0))
    assert sorted(min((b - a) % 12, (a - b) % 12) for a, b in pairs) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_the_sign_flip_test_is_exact_for_few_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    assert sign_flip_p(torch.full((6,), -1.0, dtype=torch.float64), generator) == pytest.approx(1 / 64, rel=0.2)
    assert sign_flip_p(torch.tensor([1.0, -1.0] * 8, dtype=torch.float64), generator) > 0.4


@pytest.mark.parametrize(("fields", "error", "param"), [
    ({"order": DAYS[:6]}, OneClass, "examples"), ({"order": [*DAYS, "day9"]}, OneClass, "examples"),
    ({"order": []}, InvalidRequest, None), ({"layout": "graph"}, InvalidRequest, None),
    ({"order": [*DAYS, "day0"]}, InvalidRequest, None), ({"answers": {"day0": ["day1"]}}, NoContrast, "answers"),
    ({"layout": "graph", "order": [], "coordinates": {day: [n, n] for n, day in enumerate(DAYS)}}, InvalidRequest,
     "coordinates"),
    ({"layout": "graph", "order": [], "coordinates": {day: [n] for n, day in enumerate(DAYS)}}, InvalidRequest, None),
    ({"examples": [*examples(DAYS), {"text": "c99 said day3", "label": "day3"}]}, AnswerInPrompt, "examples[70].text"),
    ({"layout": "sequential", "order": DAYS[:4], "examples": examples(DAYS[:4])}, TooFewExamples, "order"),
    ({"examples": examples(DAYS, 1)}, TooFewExamples, "examples"), ({"draws": 3}, InvalidRequest, "draws"),
])
def test_bad_requests_are_refused(fields: dict[str, Any], error: type[TrimtabError], param: str | None) -> None:
    with pytest.raises(error) as caught:
        extract(PlaceToy(on_ring, DAYS), **{"examples": examples(DAYS), "layout": "cyclic", "order": DAYS, **fields})
    assert caught.value.param == param
