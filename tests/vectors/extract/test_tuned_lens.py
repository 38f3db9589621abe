"""The tuned lens on a model whose last layer is a diagonal map of its first, plus noise."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.vectors.extract.toy import D_MODEL, VOCAB, Toy, cosine, never, noise, silent
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods.tuned_lens import Sums
from vectors.extract.refusals import LeakingSplit, TextTooLong, TooFewExamples

SCALE = 1 + 0.8 * noise("scale").tanh()
SHIFT = noise("shift")


class MappedToy(Toy):
    """What block 2 leaves is SCALE * what block 1 left + SHIFT, up to noise; it says what that points to."""

    def __init__(self, *, mapped: bool = True) -> None:
        super().__init__()
        self.mapped = mapped
        self.unembedding = torch.stack([noise("u", n) for n in range(VOCAB)])

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.stack([noise("e", tuple(ids[:n + 1])) for n in range(len(ids))])

    def neurons(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        if layer != 2:
            return torch.zeros(len(ids), D_MODEL, dtype=torch.float64)
        goal = resid * SCALE + SHIFT if self.mapped else torch.stack(
            [noise("f", tuple(ids[:n + 1])) for n in range(len(ids))])
        push = goal + 0.1 * torch.stack([noise("n", tuple(ids[:n + 1])) for n in range(len(ids))]) - resid
        return torch.linalg.solve(self.w_down[layer], push.T).T

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        return self.unembedding @ resid


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    prompts = [f"tell me more about t{n}" for n in range(40)]
    given = {"name": "lens", "prompts": prompts, "max_tokens": 4, **fields}
    return prepare("tuned_lens", parse_request("tuned_lens", given), toy or MappedToy(), "test").run(silent, never)


def test_a_planted_map_is_found() -> None:
    found = extract()
    assert set(found.payload.layers) == {0, 1} and found.metadata.kind == "diagonal"
    for layer in (0, 1):
        numbers = found.payload.layers[layer]
        assert cosine(numbers["scale"] - 1, SCALE - 1) > 0.95 and cosine(numbers["shift"], SHIFT) > 0.95
        report = found.report["layers"][str(layer)]
        assert report["explained"] > 0.95 > report["explained_untuned"]
        assert report["explained_other_tokens"] < 0.6
        assert report["tuned_kl"] < 0.5 * report["logit_kl"] and report["tuned_top1"] > report["logit_top1"]
    assert found.report["controls"]["dealt_dims"]["percentile"] == 100
    assert found.metadata.card is not None and found.metadata.card["dev"]["explained"] > 0.95


def test_without_a_map_nothing_is_gained() -> None:
    report = extract(MappedToy(mapped=False)).report["layers"]["1"]
    assert report["explained"] < 0.2


def test_sums_are_a_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    x[:, 2] = 4.0
    y = x * torch.tensor([2.0, -1.0, 3.0]) + torch.tensor([1.0, 0.0, 5.0]) + 0.1 * torch.randn(
        50, 3, generator=generator, dtype=torch.float64)
    sums = Sums.empty(3)
    sums.add(x[:20], y[:20])
    sums.add(x[20:], y[20:])
    numbers = sums.fit()
    for k in range(2):
        slope, offset = torch.linalg.lstsq(torch.stack([x[:, k], torch.ones(50)], dim=1).double(), y[:, k:k + 1]
                                           ).solution.flatten().tolist()
        assert (float(numbers["scale"][k]), float(numbers["shift"][k])) == pytest.approx((slope, offset))
    assert float(numbers["scale"][2]) == 1.0
    residual = ((numbers["scale"] * x + numbers["shift"] - y) ** 2).sum()
    assert sums.explained(**numbers) == pytest.approx(1 - float(residual / ((y - y.mean(dim=0)) ** 2).sum()))


@pytest.mark.parametrize(("fields", "error"), [
    ({"prompts": ["a b", "a b", *(f"t{n}" for n in range(20))]}, LeakingSplit),
    ({"prompts": ["a b", "c d"]}, TooFewExamples), ({"prompts": ["w " * 300, *(f"t{n}" for n in range(20))]},
                                                      TextTooLong)])
def test_bad_data(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        extract(**fields)
