"""Normality on a model of which normal text stays near a plane that turns slowly."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.artifacts.normality import NORMAL_FORMS
from tests.vectors.extract.toy import D_MODEL, Toy, never, noise, silent, unit
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.refusals import LeakingSplit, TooFewExamples

WINDOW = 8


class Steady(Toy):
    """A word lies in a plane, where it follows from the word before it; a word that does not leaves the plane."""

    def __init__(self, *, planted: bool = True) -> None:
        super().__init__()
        self.planted = planted

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        rows = []
        for n, token in enumerate(ids):
            inside = 2 * noise("a", token)[0] * unit("p") + 2 * noise("a", token)[1] * unit("q")
            follows = n == 0 or token == ids[n - 1] + 1
            away = 0.1 if follows or not self.planted else 1.0
            rows.append(inside + away * noise("w", tuple(ids[:n + 1])) + unit("mean"))
        # As a massive activation has it, in a dim of its own.
        rows[0] = rows[0] + 500 * torch.eye(D_MODEL, dtype=torch.float64)[3]
        return torch.stack(rows)


PROMPTS = [[0, *range(1 + 3 * n, 25 + 3 * n)] for n in range(60)]


def extract(toy: Toy, **fields: Any) -> Extraction:
    given = {"name": "normal", "prompts": PROMPTS, "max_tokens": 0, "window": WINDOW, "layers": [1],
             "false_alarms": 0.02, **fields}
    return prepare("normality", parse_request("normality", given), toy, "test").run(silent, never)


def test_what_is_not_normal_is_told_and_what_is_stays_quiet() -> None:
    found = extract(Steady())
    assert found.metadata.kind == "normality" and found.metadata.op is None and set(found.payload.layers) == {1}
    for form in NORMAL_FORMS:
        told = found.report["layers"]["1"][form]
        assert told["false_alarms"] < 0.15, form
    for form in ("mahalanobis", "residual"):
        told = found.report["layers"]["1"][form]
        assert told["dealt"]["auc"] > 0.95 and told["random"]["auc"] > 0.95 and told["dealt"]["found"] > 0.2, form
    assert found.report["layers"]["1"]["spectral"]["dealt"]["auc"] > 0.9
    assert "draft" not in (found.metadata.card or {})
    numbers = found.payload.layers[1]
    # The dim that only first tokens fill is as narrow as they leave it.
    assert float(numbers["scale"][3]) < 5
    assert found.metadata.reading is not None and found.metadata.reading.form == "mahalanobis"


def test_a_model_to_which_order_means_nothing_makes_a_draft() -> None:
    """The control: dealt and random texts are as normal as the others are."""
    found = extract(Steady(planted=False))
    told = found.report["layers"]["1"]["mahalanobis"]
    assert told["dealt"]["auc"] < 0.8
    assert found.metadata.card is not None and "draft" in found.metadata.card


def test_equal_requests_make_equal_numbers() -> None:
    one, two = extract(Steady()), extract(Steady())
    assert all(torch.equal(one.payload.layers[1][name], tensor) for name, tensor in two.payload.layers[1].items())


@pytest.mark.parametrize(("fields", "error"), [
    ({"window": 30}, TooFewExamples), ({"prompts": [*PROMPTS, PROMPTS[3]]}, LeakingSplit)])
def test_refusals(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        extract(Steady(), **fields)
