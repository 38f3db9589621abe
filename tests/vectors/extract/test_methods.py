"""Every method against a planted direction, and the centring trap."""

import random
from pathlib import Path

import pytest
import torch
from sklearn.decomposition import PCA

from steering.ops import operations
from tests.vectors.extract.planted import DIRECTIONS, SHIFTS, Planted, cosine, never, pairs, request, run, silent
from vectors.extract import METHODS, RECIPES, get_recipe, methods
from vectors.extract.contract import Pair
from vectors.extract.contrastive import Contrastive
from vectors.extract.methods.logistic_probe import LogisticProbe
from vectors.extract.methods.pca_repe import balanced_signs
from vectors.extract.principal import principal_direction
from vectors.extract.refusals import FitFailed

CONTRASTIVE = tuple(name for name, recipe in RECIPES.items() if isinstance(recipe, Contrastive))


def recipe_of(name: str) -> Contrastive:
    recipe = get_recipe(name)
    assert isinstance(recipe, Contrastive)
    return recipe


def stacked(count: int, layer: int, planted: Planted) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of `count` pairs at one layer, positive and negative."""
    sides = [[planted.token(getattr(pair, side), 2, layer) for pair in pairs(count)]
             for side in ("positive", "negative")]
    return torch.stack(sides[0]), torch.stack(sides[1])


def test_the_table_has_every_module_once_and_every_method_says_what_it_makes() -> None:
    modules = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__"}
    assert sorted(METHODS) == sorted(modules)
    assert len(set(METHODS)) == len(METHODS) == len({recipe.summary for recipe in RECIPES.values()})
    for recipe in RECIPES.values():
        assert set(recipe.ops) <= {operation.name for operation in operations()}
        # What is only read has no op, and says so.
        assert recipe.ops or recipe.untried
        assert recipe.sites or "site" in recipe.request.model_fields
        assert recipe.data_field() in recipe.request.model_fields


@pytest.mark.parametrize("method", CONTRASTIVE)
def test_a_planted_direction_is_recovered_with_its_sign_and_length(method: str) -> None:
    extraction = run(request(pairs(100), method=method), Planted(), silent, never)
    for layer in (2, 3):
        vector = extraction.payload.layers[layer]["vector"]
        assert cosine(vector, DIRECTIONS[layer]) > 0.95
        assert float(vector.norm()) == pytest.approx(SHIFTS[layer], rel=0.1)
    report = extraction.report
    assert report["best_layer"] == 2
    assert report["layers"]["2"]["test"]["auc"] == 1.0
    assert report["layers"]["2"]["test"]["pair_accuracy"] == 1.0
    # Nothing is planted at layer 0, so nothing may be found there.
    assert abs(cosine(extraction.payload.layers[0]["vector"], DIRECTIONS[0])) < 0.5
    assert 0.2 < report["layers"]["0"]["test"]["auc"] < 0.8


@pytest.mark.parametrize("method", CONTRASTIVE)
def test_labels_that_mean_nothing_give_nothing(method: str) -> None:
    coin = random.Random(5)
    shuffled = [pair if coin.random() < 0.5 else Pair(positive=pair.negative, negative=pair.positive)
                for pair in pairs(300)]
    extraction = run(request(shuffled, method=method), Planted(), silent, never)
    for scores in extraction.report["layers"].values():
        assert 0.25 < scores["test"]["auc"] < 0.75


def test_centred_differences_lose_the_shared_shift_and_pairwise_keeps_it() -> None:
    """PCA that centres the differences removes the very mean that was looked for."""
    positive, negative = stacked(100, 2, Planted(vary=4.0))
    differences = positive - negative
    trapped = torch.from_numpy(PCA(n_components=1).fit(differences.numpy()).components_[0])
    assert abs(cosine(trapped, DIRECTIONS[2])) < 0.3
    for name in ("pca_pairwise", "pca_repe"):
        found = recipe_of(name).fit(positive, negative, torch.Generator().manual_seed(0))
        assert abs(cosine(found, DIRECTIONS[2])) > 0.95


@pytest.mark.parametrize("shape", [(5, 30), (40, 30), (30, 30)])
def test_the_principal_direction_is_the_first_right_singular_vector(shape: tuple[int, int]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.7
    expected = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    found = principal_direction(rows)
    assert abs(cosine(found, expected)) == pytest.approx(1.0, abs=1e-9)
    assert float(found.norm()) == pytest.approx(1.0)


def test_no_variance_is_a_refusal() -> None:
    with pytest.raises(FitFailed) as caught:
        principal_direction(torch.zeros(6, 4, dtype=torch.float64))
    assert caught.value.param == "pairs"


@pytest.mark.parametrize("count", [2, 7, 20])
def test_repe_draws_as_many_signs_of_each_kind_as_it_can(count: int) -> None:
    signs = balanced_signs(count, torch.Generator().manual_seed(3))
    assert int((signs == -1).sum()) == count // 2
    assert int((signs == 1).sum()) == count - count // 2


def test_the_probe_ignores_dims_that_never_vary() -> None:
    positive, negative = stacked(60, 2, Planted())
    positive[:, 7] = negative[:, 7] = 3.0
    found = LogisticProbe().fit(positive, negative, torch.Generator())
    assert float(found[7]) == 0.0
    assert bool(torch.isfinite(found).all())
