"""Training: batches are a function of (seed, step); a resumed run equals an uninterrupted one."""

from functools import lru_cache

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lab import model_path, models
from lab import train as training
from lab.batches import LONG_EVERY, make_batch
from lab.train import Phase, Recipe, rate_at, train

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
             head_dim=16)
TINY = {"lab-dense": dict(**SMALL, intermediate_size=32),
        "lab-moe": dict(**SMALL, moe_intermediate_size=32, num_experts=4)}
PHASES = (Phase(3, 6, 2e-3, 0.5), Phase(3, 3, 1e-3, 0.5, {"tasks": 1.0, "facts": 1.0}, {"facts": 3.0}))
RECIPE = Recipe(PHASES, rows=4, length=64)


@lru_cache
def committed(name: str = "lab-dense") -> PreTrainedTokenizerBase:
    """What `build_tokenizer` makes, as another test shows, without the half minute that it reads the corpus for."""
    return AutoTokenizer.from_pretrained(model_path(name))


@pytest.fixture(autouse=True)
def _committed_tokenizer(monkeypatch):
    for module in (models, training):
        monkeypatch.setattr(module, "build_tokenizer", committed)


@pytest.fixture(autouse=True)
def _one_thread():
    # Sums over several threads may differ in the last bit.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_batch_depends_on_seed_and_step_alone():
    tok = committed()
    one, two = (make_batch(tok, 1, 3, 8, 64) for _ in range(2))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.weight, two.weight)
    assert not torch.equal(one.ids, make_batch(tok, 1, 4, 8, 64).ids)


def test_documents_do_not_see_each_other_and_rows_are_well_filled():
    tok = committed()
    batch = make_batch(tok, 1, 0, 8, 128)
    mask = batch.mask()[:, 0]
    rows, queries, keys = mask.nonzero(as_tuple=True)
    assert (batch.document[rows, queries] == batch.document[rows, keys]).all()
    assert (queries >= keys).all()
    assert (batch.document >= 0).float().mean() > 0.8
    assert not batch.weight[batch.document < 0].any()


def test_long_conversations_get_long_rows():
    batch = make_batch(committed(), 1, LONG_EVERY - 1, 8, 128)
    assert batch.ids.shape == (4, 256)


@pytest.mark.parametrize("name", TINY)
def test_resumed_training_equals_uninterrupted_training(name, tmp_path):
    whole, log = train(name, RECIPE, tmp_path / "whole.pt", quiet=True, **TINY[name])
    train(name, RECIPE, tmp_path / "cut.pt", stop_after=4, quiet=True, **TINY[name])
    resumed, log2 = train(name, RECIPE, tmp_path / "cut.pt", quiet=True, **TINY[name])
    assert log["steps"] == log2["steps"] == 6 and log["tokens"] == log2["tokens"]
    for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    train("lab-dense", RECIPE, tmp_path / "a.pt", stop_after=2, quiet=True, **TINY["lab-dense"])
    other = Recipe(PHASES[:1], rows=4, length=64)
    with pytest.raises(ValueError, match="another recipe"):
        train("lab-dense", other, tmp_path / "a.pt", quiet=True, **TINY["lab-dense"])


def test_importance_weighs_answers_of_its_skill_alone():
    tok = committed()
    plain = make_batch(tok, 1, 0, 8, 128)
    heavy = make_batch(tok, 1, 0, 8, 128, importance={"calendar": 5.0})
    assert torch.equal(plain.ids, heavy.ids)
    assert set(plain.weight.unique().tolist()) == {0.0, 1.0}
    assert set(heavy.weight.unique().tolist()) == {0.0, 1.0, 5.0}
    raised = heavy.weight == 5.0
    assert torch.equal(plain.weight[~raised], heavy.weight[~raised])
    assert (plain.weight[raised] == 1.0).all()


def test_the_rate_is_that_of_one_cycle():
    phase = Phase(80, 100, 2e-3, 0.1)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=phase.peak_rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=phase.peak_rate, total_steps=phase.cycle, pct_start=phase.warm_up,
        cycle_momentum=False)
    for step in range(phase.steps):
        assert rate_at(step, phase) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        cycle.step()


def test_phases_follow_each_other():
    assert RECIPE.steps == 6
    assert RECIPE.phase_at(2) == (PHASES[0], 2)
    assert RECIPE.phase_at(3) == (PHASES[1], 0)
    with pytest.raises(ValueError, match="no such step"):
        RECIPE.phase_at(6)
