"""Training on rows that are sums of a few planted directions: these are found, and in dealt rows they are not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steering.artifacts.dictionary import Dictionary
from vectors.extract.dictionary.checkpoint import Checkpoint
from vectors.extract.dictionary.quality import of_rows, stability
from vectors.extract.dictionary.rows import ActivationRows
from vectors.extract.dictionary.training import Plan, Training

D, M, K, BATCH = 32, 64, 4, 256


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def directions(seed: int = 1) -> Tensor:
    rows = torch.randn(M, D, generator=drawn(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def planted(count: int, seed: int) -> Tensor:
    """K of M directions in each row, as strong as they come, round a mean and with a little noise."""
    generator = drawn(seed)
    on = torch.rand(count, M, generator=generator).topk(K).indices
    value = torch.zeros(count, M).scatter(1, on, torch.rand(count, K, generator=generator) + 0.5)
    return 5 * value @ directions() + 3 + 0.1 * torch.randn(count, D, generator=generator)


def dealt(rows: Tensor) -> Tensor:
    """Every dim by itself in another order: nothing is left but what single dims are like."""
    generator = drawn(7)
    return torch.stack([column[torch.randperm(len(column), generator=generator)] for column in rows.T], dim=1)


def trained(rows: Tensor, steps: int, seed: int = 0, **plan: Any) -> tuple[Training, dict[str, Tensor]]:
    with ActivationRows(len(rows), D) as held:
        held.add(rows)
        one = Training(Plan(D, M, K, steps=steps, batch=BATCH, **plan), seed)
        for step in range(steps):
            one.step(held.batch(BATCH, seed, step))
        return one, one.numbers(held.mean, held.scale)


def nearest(numbers: dict[str, Tensor]) -> float:
    """Mean over planted directions of the largest cosine with a decoder row."""
    rows = numbers["decoder"].numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return float((directions().numpy() @ rows.T).max(axis=1).mean())


ROWS = planted(20_000, 2)


@pytest.mark.parametrize(("activation", "steps"), [("topk", 1200), ("jumprelu", 2000)])
def test_planted_directions_are_found_and_in_dealt_rows_they_are_not(activation: Any, steps: int) -> None:
    _, numbers = trained(ROWS, steps, activation=activation)
    assert nearest(numbers) > 0.9
    found = of_rows(numbers, planted(4000, 3), planted(4000, 4), drawn(5))
    assert found["explained"] > 0.8 and abs(found["l0"] - K) < 1.5 and found["dead"] < 0.25
    _, control = trained(dealt(ROWS), 400, activation=activation)
    assert nearest(control) < 0.6


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_dead_features_are_given_something_to_do(activation: Any) -> None:
    """A half begins so small that the others always come before it, or that it never passes its thresholds."""
    dead, held_out = {}, planted(2000, 4)
    for repair in (True, False):
        with ActivationRows(4000, D) as held:
            held.add(ROWS[:4000])
            one = Training(Plan(D, M, K, activation, steps=500, batch=64, repair=repair), 0)
            one.parameters["encoder"][:M // 2] *= 0.05
            for step in range(one.plan.steps):
                one.step(held.batch(one.plan.batch, 0, step))
            dead[repair] = of_rows(one.numbers(held.mean, held.scale), held_out, held_out, drawn(5))["dead"]
    assert dead[True] < dead[False] - 0.1, dead


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_one_that_goes_on_is_the_one_that_was_not_cut_off(activation: Any, tmp_path: Path) -> None:
    plan = Plan(D, M, K, activation, steps=260, batch=64)
    with ActivationRows(4000, D) as held:
        held.add(ROWS[:4000])
        whole, checkpoint = Training(plan, 3), Checkpoint(tmp_path / "kept.safetensors")
        for step in range(plan.steps):
            if step == 170:
                checkpoint.save(step, whole.state())
            whole.step(held.batch(plan.batch, 3, step))
        kept = checkpoint.load()
        assert kept is not None and kept[0] == 170
        other = Training(plan, 99)
        other.restore(kept[1], kept[0])
        for step in range(kept[0], plan.steps):
            other.step(held.batch(plan.batch, 3, step))
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in whole.state().items())


def test_a_checkpoint_that_is_damaged_or_cannot_be_kept_is_none(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    path.write_bytes(b"no safetensors")
    assert Checkpoint(path).load() is None and Checkpoint(None).load() is None
    gone = Checkpoint(tmp_path / "nowhere" / "kept.safetensors")
    gone.save(1, {"x": torch.zeros(2)})
    assert gone.lost and gone.load() is None


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_an_artifact_has_the_numbers_that_training_had(activation: Any) -> None:
    """By numpy, from the parameters: centring and scaling are folded into what is stored."""
    one, numbers = trained(ROWS[:3000], 60, activation=activation)
    mean, spread = ROWS[:3000].double().mean(0), ROWS[:3000].double()
    scale = float((spread - mean).square().mean().sqrt())
    held = {name: tensor.double().numpy() for name, tensor in one.parameters.items()}
    x = (ROWS[:40].double() - mean).numpy() / scale
    pre = (x - held["centre"]) @ held["encoder"].T + held["bias"]
    if activation == "topk":
        least = np.sort(pre, axis=1)[:, -K][:, None]
        value = np.where(pre >= least, np.maximum(pre, 0), 0)
    else:
        value = np.where(pre > np.exp(held["threshold"]), pre, 0)
    expected = (value @ held["decoder"] + held["centre"]) * scale + mean.numpy()
    dictionary = Dictionary(numbers)
    np.testing.assert_allclose(dictionary.features(ROWS[:40]).numpy(), value * scale, atol=2e-3)
    np.testing.assert_allclose(dictionary.reconstruction(ROWS[:40]).numpy(), expected, atol=2e-3)
    assert torch.allclose(numbers["decoder"].norm(dim=1), torch.ones(M), atol=1e-5)


def test_figures_are_those_of_numpy() -> None:
    _, numbers = trained(ROWS[:3000], 100, activation="topk")
    dev, test = planted(2000, 3), planted(1500, 4)
    found = of_rows(numbers, dev, test, drawn(5))
    n = {name: tensor.double().numpy() for name, tensor in numbers.items()}

    def errors(x: Any) -> tuple[Any, Any]:
        pre = x @ n["encoder"].T + n["encoder_bias"]
        value = np.where(pre >= np.sort(pre, axis=1)[:, -K][:, None], np.maximum(pre, 0), 0)
        return x - value @ n["decoder"] - n["decoder_bias"], value

    x, held_out = dev.double().numpy(), test.double().numpy()
    (error, _), (other, value) = errors(x), errors(held_out)
    variance = ((held_out - held_out.mean(0))**2).sum()
    assert found["explained"] == pytest.approx(1 - (other**2).sum() / variance, abs=1e-4)
    shares = np.linalg.norm(other, axis=1) / np.linalg.norm(held_out, axis=1)
    assert found["error_share"] == pytest.approx(shares.mean(), abs=1e-4)
    assert found["l0"] == pytest.approx((value > 0).sum(1).mean(), abs=0.01)
    assert found["dead"] == pytest.approx((value == 0).all(0).mean()) and found["dense"] == pytest.approx(
        ((value > 0).mean(0) > 0.2).mean())
    design = np.column_stack([x, np.ones(len(x))])
    weights = np.linalg.lstsq(design, error, rcond=None)[0]
    left = other - np.column_stack([held_out, np.ones(len(held_out))]) @ weights
    share = 1 - (left**2).sum() / ((other - other.mean(0))**2).sum()
    assert found["predictable"] == pytest.approx(share, abs=1e-2)
    assert found["predictable_dealt"] < 0.05 < found["predictable"]


def test_two_seeds_agree_about_planted_directions_and_not_about_noise() -> None:
    pairs = {}
    for name, rows in (("planted", ROWS), ("noise", torch.randn(ROWS.shape, generator=drawn(8)))):
        one, two = (trained(rows, 700, seed=seed, activation="topk")[1]["decoder"] for seed in (0, 1))
        pairs[name] = stability(one, two, 20, drawn(6))
    assert pairs["planted"]["found"] > 0.85 > pairs["planted"]["max"] and pairs["planted"]["same"] > 0.8
    assert pairs["noise"]["found"] < 0.7 and pairs["noise"]["same"] < 0.5


def test_features_that_the_model_feels_are_chosen() -> None:
    """Two directions are equally large; the model's loss feels one of them. By size alone both are kept equally often,
    by the gradient the one that is felt."""
    plan = Plan(D, M, 1, steps=10, batch=BATCH, gradient=10.0)
    chosen = {}
    for name in ("size", "gradient"):
        one = Training(plan, 0)
        decoder = torch.linalg.qr(torch.randn(D, D, generator=drawn(9))).Q
        one.parameters.update(encoder=torch.cat([decoder, -decoder]), decoder=torch.cat([decoder, -decoder]))
        x = (decoder[0] + decoder[1]) * 4 + 0.3 * torch.randn(BATCH, D, generator=drawn(10))
        gradient = decoder[1].expand(BATCH, D) if name == "gradient" else None
        before = one.parameters["bias"].clone()
        one.step(x, gradient)
        moved = (one.parameters["bias"] - before).abs() > 0
        chosen[name] = moved.nonzero().flatten().tolist()
    assert {0, 1} <= set(chosen["size"]) and 1 in chosen["gradient"] and 0 not in chosen["gradient"]
