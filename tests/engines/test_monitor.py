"""Monitors on a real engine: scores of a steered completion against plain hooks, on every form."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.observability.instruments import Registry
from server.requests.monitor import Monitor, MonitorMetrics, Watched, watch
from steering.artifacts.normality import NORMAL_FORMS, normal_scores
from steering.artifacts.spline import Manifold
from steering.programs.reading import Reader
from tests.engines import reference as ref
from tests.engines.conftest import compiled, generate, ids
from tests.engines.test_gates import ADD, PROMPTS, VECTOR, WEIGHT
from tests.vectors.making import normality_numbers

GENERATED = {**ADD, "layers": [0], "scope": {"prompt": {"positions": [-1]}, "generation": "all"}}
RING = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(4))).Q.T.contiguous()
KNOTS = torch.arange(6, dtype=torch.float32).unsqueeze(1)
POINTS = 3 * torch.stack([torch.cos(KNOTS[:, 0] * torch.pi / 3), torch.sin(KNOTS[:, 0] * torch.pi / 3)], dim=1)


def test_distance_to_a_ring() -> None:
    """Points of a circle of radius 3 are (nearly) 0 away from its spline, its centre is 3 away."""
    tensors = {"basis": RING, "mean": torch.ones(32), "knots": KNOTS, "points": POINTS, "period": torch.tensor([6.0])}
    angle = torch.linspace(0, 6, 40)
    on = 3 * torch.stack([angle.cos(), angle.sin()], dim=1) @ RING + 1
    reader = Reader("ring@1", "resid_post", "distance", {1: tensors})
    assert float(reader.scores(1, on).max()) < 0.05
    off = torch.randn(5, 32, generator=torch.Generator().manual_seed(5))
    off -= off @ RING.T @ RING
    assert reader.scores(1, off + 1).tolist() == pytest.approx([3.0] * 5, abs=0.05)
    assert Manifold.build(KNOTS, POINTS, torch.tensor([6.0])).axes == 1


def test_a_manifold_is_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = Manifold.build
    monkeypatch.setattr(Manifold, "build", lambda *tensors: built.append(1) or build(*tensors))
    reader = Reader("line@1", "resid_post", "distance", {1: {
        "basis": torch.eye(2, 4), "mean": torch.zeros(4), "knots": torch.tensor([[0.0], [1.0]]),
        "points": torch.tensor([[0.0, 0.0], [1.0, 0.0]]), "period": torch.tensor([0.0])}})
    h = torch.tensor([[0.5, 2.0, 7.0, 7.0], [3.0, 0.0, 0.0, 0.0]])
    for _ in range(3):
        torch.testing.assert_close(reader.scores(1, h), torch.tensor([2.0, 2.0]), atol=1e-2, rtol=0)
    assert built == [1]


async def test_windows_reach_from_the_prompt_into_the_answer(start_engine: Any, model_dir: Any) -> None:
    """The forms of a normality artifact on what plain hooks find, prompt and answer in one."""
    engine = await start_engine("qwen3")
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()
    tensors = normality_numbers(32)
    monitors = [Monitor(Reader("n@1", "resid_post", form, {1: tensors}), None, "above") for form in NORMAL_FORMS]
    tokens, _ = await generate(engine, PROMPTS[0], compiled(engine, GENERATED), max_tokens=20)
    choice = Watched(0, compiled(engine, GENERATED), PROMPTS[0], ids(tokens), None)
    reports = await watch(monitors, [choice], engine, MonitorMetrics(Registry()))
    held: list[torch.Tensor] = []
    ref.logprobs(model, [*choice.prompt_ids, *choice.generated_ids], len(choice.prompt_ids), [
        ref.Edit("resid_post", 0, ref.add(VECTOR), ref.last_prompt_and_generated),
        ref.Edit("resid_post", 1, lambda h: held.append(h) or h, ref.everywhere)])
    for form, report in zip(NORMAL_FORMS, reports, strict=True):
        expected = normal_scores(form, held[-1], tensors)
        found = report.choices[0]
        told = [*found.prompt["1"], *found.generation["1"]]
        assert [one is None for one in told] == expected.isnan().tolist(), form
        scored = [one for one in told if one is not None]
        assert scored == pytest.approx(expected[~expected.isnan()].tolist(), rel=1e-2, abs=1e-3), form
        assert len(scored) > len(choice.generated_ids)


async def test_scores_equal_hooks(start_engine: Any, model_dir: Any) -> None:
    engine = await start_engine("qwen3")
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()
    probe = Monitor(Reader("probe@1", "resid_post", "linear", {
        n: {"weight": WEIGHT, "bias": torch.tensor(0.5)} for n in (0, 2)}), None, "above")
    vector = Monitor(Reader("vector@1", "mlp_out", "cosine", {1: {"vector": VECTOR}}), None, "above")
    program = compiled(engine, GENERATED)
    choices = []
    for n, prompt in enumerate(PROMPTS[:3]):
        tokens, _ = await generate(engine, prompt, program if n else None)
        choices.append(Watched(n, program if n else None, prompt, ids(tokens), None))
    reports = await watch([probe, vector], choices, engine, MonitorMetrics(Registry()))
    for choice in choices:
        held: dict[tuple[str, int], torch.Tensor] = {}

        def keep(site: str, layer: int, held: dict[tuple[str, int], torch.Tensor] = held) -> Any:
            def function(h: torch.Tensor) -> torch.Tensor:
                held[site, layer] = h
                return h

            return ref.Edit(site, layer, function, ref.everywhere)

        steer = [ref.Edit("resid_post", 0, ref.add(VECTOR), ref.last_prompt_and_generated)] if choice.program else []
        whole = [*choice.prompt_ids, *choice.generated_ids]
        ref.logprobs(model, whole, len(choice.prompt_ids), [
            *steer, keep("resid_post", 0), keep("resid_post", 2), keep("mlp_out", 1)])
        for layer in (0, 2):
            expected = (held["resid_post", layer] @ WEIGHT + 0.5).tolist()
            found = reports[0].choices[choice.index]
            assert [*found.prompt[str(layer)], *found.generation[str(layer)]] == pytest.approx(expected, abs=1e-3)
        cosine = torch.nn.functional.cosine_similarity(held["mlp_out", 1], VECTOR[None], dim=-1)
        found = reports[1].choices[choice.index]
        assert [*found.prompt["1"], *found.generation["1"]] == pytest.approx(cosine.tolist(), abs=1e-4)
    assert [report.status for report in reports] == ["read", "read"]
