"""Skill axes on sequences whose genres are planted directions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from steering.language.errors import TrimtabError
from tests.vectors.extract.toy import D_MODEL, Toy, cosine, never, noise, silent
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods.native_skills import axes, clean, explained
from vectors.extract.refusals import ConstantActivations, EmptyText, LeakingSplit, OneClass, TooFewExamples

GENRES = ("code", "song", "tale")
BASIS = torch.linalg.qr(torch.stack([noise("genre", n) for n in range(4)]).T).Q.T
STRENGTH = (3.0, 2.0, 1.0)
MASSIVE_DIM = 5


class GenreToy(Toy):
    """A sequence lies along the axis of its genre, as much as its own noise says; long ones along a fourth; dim 5 is
    massive, the first token a sink."""

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        h = torch.stack([0.2 * noise("e", tuple(ids), n) for n in range(len(ids))])
        for n, genre in enumerate(GENRES):
            if genre in self.said(ids):
                h += STRENGTH[n] * (1.5 + 0.3 * noise("own", tuple(ids), width=1)) * BASIS[n]
        h += 0.8 * len(ids) * BASIS[3]
        h[:, MASSIVE_DIM] += 3000.0 * (1 + 0.1 * float(noise("massive", tuple(ids), width=1)))
        h[0] = 500.0
        return h


def sequences(count: int = 90, **fields: Any) -> list[dict[str, Any]]:
    return [{"text": f"{GENRES[n % 3]} s{n} " + "la " * (n // 3 % 5), "label": GENRES[n % 3], **fields}
            for n in range(count)]


def extract(toy: Toy | None = None, **fields: Any) -> Extraction:
    given = {"name": "skills", "sequences": sequences(), "rank": 2, "layers": [0, 1], **fields}
    return prepare("native_skills", parse_request("native_skills", given), toy or GenreToy(), "test").run(silent, never)


def test_planted_axes_are_found_without_length_and_massive_dims() -> None:
    found = extract()
    basis = found.payload.layers[1]["basis"].double()
    assert list(found.payload.layers) == [1]
    assert found.report["massive_dims_left_out"] == [MASSIVE_DIM]
    # The plane of differences between three genre means, and neither length nor the massive dim.
    for one, two in ((0, 1), (1, 2)):
        difference = STRENGTH[one] * BASIS[one] - STRENGTH[two] * BASIS[two]
        difference[MASSIVE_DIM] = 0.0
        assert float((basis @ difference).norm() / difference.norm()) > 0.95
    assert float((basis @ BASIS[3]).norm()) < 0.35
    assert max(map(abs, found.report["length_correlation"])) < 0.5
    assert min(found.report["split_half_cosines"]) > 0.9
    assert max(found.report["random_half_cosines"]) < 0.8
    assert {name: entry["auc"] > 0.95 for name, entry in found.report["labels"].items()}["code"]
    assert found.report["controls"]["shuffled_labels"]["percentile"] == 100.0
    assert found.report["controls"]["random_axes_of_the_subspace"]["draws"] == 20
    assert (found.metadata.kind, found.metadata.op) == ("subspace", "ablate")
    card = found.metadata.card or {}
    for split in ("dev", "test"):
        assert min(card[split]["best_axis_auc"].values()) > 0.95


def test_the_share_that_axes_explain_is_what_projecting_leaves() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 6))
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 2)))[0].T
    left = rows - rows @ basis.T @ basis
    assert explained(torch.tensor(rows), torch.tensor(basis)) == pytest.approx(1 - (left**2).sum() / (rows**2).sum())


def test_without_the_regression_length_is_the_first_thing_found() -> None:
    class Long(GenreToy):
        def embed(self, ids: Sequence[int]) -> torch.Tensor:
            return super().embed(ids) + 6.0 * len(ids) * BASIS[3]

    kept = BASIS[3].clone()
    kept[MASSIVE_DIM] = 0.0
    first = extract(Long(), regress_length=False).payload.layers[1]["basis"][0]
    assert abs(cosine(first, kept)) > 0.9
    assert abs(cosine(extract(Long()).payload.layers[1]["basis"][0], kept)) < 0.5


def test_one_axis_becomes_a_vector_as_long_as_its_spread() -> None:
    found = extract(axis=1)
    whole = extract()
    vector = found.payload.layers[1]["vector"]
    assert (found.metadata.kind, found.metadata.op) == ("vector", "add")
    assert cosine(vector, whole.payload.layers[1]["basis"][1]) == pytest.approx(1.0, abs=1e-5)
    assert float(vector.norm()) == pytest.approx(found.metadata.sigma[1], rel=1e-5)
    assert float(vector.norm()) == pytest.approx(whole.report["axis_std"][1], rel=1e-4)


def test_shuffled_genres_are_at_the_level_of_luck() -> None:
    mixed = [{**s, "label": GENRES[int(noise("mix", n, width=1) * 1e6) % 3]} for n, s in enumerate(sequences())]
    assert extract(sequences=mixed).report["controls"]["shuffled_labels"]["percentile"] <= 97.5


def test_axes_are_those_of_a_principal_component_analysis() -> None:
    from sklearn.decomposition import PCA

    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, spread = axes(clean(rows, torch.tensor([], dtype=torch.int64), None), 3)
    expected = PCA(3).fit(rows.numpy())
    assert (basis @ torch.from_numpy(expected.components_).T).abs().diagonal().min() > 1 - 1e-9
    assert torch.allclose(spread**2 * 50 / 49, torch.from_numpy(expected.explained_variance_))


def test_nothing_that_varies_is_a_refusal() -> None:
    with pytest.raises(ConstantActivations):
        axes(torch.zeros(20, D_MODEL, dtype=torch.float64), 4)


@pytest.mark.parametrize(("given", "error", "param"), [
    ([*sequences(), {"text": " ", "label": "code"}], EmptyText, "sequences[90].text"),
    ([*sequences(), {"text": "unlabelled"}], EmptyText, "sequences"),
    ([{**s, "label": "same"} for s in sequences()], OneClass, "sequences"),
    ([*sequences(), sequences()[0]], LeakingSplit, "sequences[90]"),
    (sequences(6), TooFewExamples, "sequences"),
])
def test_bad_data_is_refused(given: list[dict[str, Any]], error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(sequences=given)
    assert caught.value.param == param
