"""Whole engines on the device: what they say is what plain hooks on the CPU say, faults stay where they are made."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from lab import model_path
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from steering.acting.containment import StepLimit
from steering.language.errors import SteeringOverflow
from tests.engines import reference as ref
from tests.engines.cases import dense_cases, vector
from tests.engines.conftest import compiled, generate, ids
from tests.gpu.conftest import CUDA
from tests.tiny import tiny

# Log-probabilities of float32 kernels that sum in another order, against the CPU's.
TOLERANCE = 5e-3
PROMPTS = [[5 + (7 * i + 3 * t) % 80 for t in range(9 + 4 * i)] for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tiny("qwen3").save_pretrained(path)
    return path


def embedded(folder: Path, device: torch.device, **changes: Any) -> TransformersEngine:
    settings: dict[str, Any] = {"device": device.type, "kv_cache_tokens": 4096, "max_batch_tokens": 64, "page_size": 8}
    return TransformersEngine(EngineOptions(model=str(folder), model_id="tiny", **settings | changes))


async def test_the_embedded_engine_says_what_hooks_on_the_cpu_say(device: torch.device, folder: Path) -> None:
    """Every dense op and an unsteered request in one batch, twice, so that the second round comes from the cache."""
    engine = embedded(folder, device, dtype="float32")
    await engine.start()
    try:
        facts = engine.facts
        cases: list[tuple[Any, Any]] = [((), ())]
        cases += dense_cases(facts.d_model, facts.d_ff, facts.num_heads, facts.head_dim, facts.num_layers)
        programs = [compiled(engine, *spec) if spec else None for spec, _ in cases]
        model = tiny("qwen3")
        for _ in range(2):
            found = await asyncio.gather(*(generate(engine, PROMPTS[i % 4], program, max_tokens=6)
                                           for i, program in enumerate(programs)))
            for i, (tokens, _) in enumerate(found):
                check(model, PROMPTS[i % 4], tokens, cases[i][1])
    finally:
        await engine.stop()


def check(model: Any, prompt: list[int], tokens: Any, edits: Any) -> None:
    rows = ref.logprobs(model, [*prompt, *ids(tokens)], len(prompt), list(edits))[len(prompt) - 1:-1]
    for token, row in zip(tokens, rows, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE)
        # Greedy, but for a tie that rounding decides.
        assert float(row.max() - row[token.token_id]) < TOLERANCE


async def test_an_overflow_on_the_device_stays_with_its_request(device: torch.device, folder: Path) -> None:
    engine = embedded(folder, device, dtype="float16" if device.type == "cuda" else "float32", self_test=False)
    await engine.start()
    try:
        alone = ids((await generate(engine, PROMPTS[0]))[0])
        faulty = compiled(engine, {"op": "add", "layers": [1], "strength": 3e38,
                                   "inline": {"vector": [1.0] * engine.facts.d_model}})
        for _ in range(3):
            innocent, failed = await asyncio.gather(generate(engine, PROMPTS[0]), generate(engine, PROMPTS[1], faulty),
                                                    return_exceptions=True)
            assert not isinstance(innocent, BaseException) and ids(innocent[0]) == alone
            assert isinstance(failed, SteeringOverflow)
    finally:
        await engine.stop()


@dataclass(frozen=True)
class Group:
    """A vLLM engine and the same weights in transformers, on the CPU."""

    engine: Any
    model: Any


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[CUDA])
async def vllm(request: pytest.FixtureRequest) -> AsyncIterator[Group]:
    """With CUDA graphs in pieces, and sites both in the graph and beside it."""
    pytest.importorskip("vllm", reason="the vLLM engine needs vLLM")
    from transformers import AutoModelForCausalLM

    from server.engines.vllm.host.engine import VllmEngine
    from server.engines.vllm.host.options import VllmOptions

    path = model_path("lab-dense")
    engine = VllmEngine(VllmOptions(model=str(path), model_id="lab-dense", dtype="float32", slots=8, max_requests=16,
                                    max_batch_tokens=128, kv_cache_tokens=8192, graph_ops="all", depth=2,
                                    step_limit=StepLimit(10_000.0), extra={"gpu_memory_utilization": 0.3}))
    await engine.start()
    try:
        yield Group(engine, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
    finally:
        await engine.stop()


@pytest.mark.asyncio(loop_scope="module")
async def test_vllm_says_what_hooks_on_the_cpu_say(vllm: Group) -> None:
    """Changing programs through few slots, in graphs that were recorded before any of them was known."""
    facts = vllm.engine.facts
    cases: list[tuple[Any, Any]] = [((), ())]
    cases += dense_cases(facts.d_model, facts.d_ff, facts.num_heads, facts.head_dim, facts.num_layers, 2.0)
    programs = [compiled(vllm.engine, *spec) if spec else None for spec, _ in cases]
    for _ in range(2):
        found = await asyncio.gather(*(generate(vllm.engine, PROMPTS[i % 4], program, max_tokens=6)
                                       for i, program in enumerate(programs)))
        for i, (tokens, _) in enumerate(found):
            check(vllm.model, PROMPTS[i % 4], tokens, cases[i][1])


@pytest.mark.asyncio(loop_scope="module")
async def test_many_programs_one_after_another_in_vllm(vllm: Group) -> None:
    """More distinct programs than slots, all at once: each answer is its own program's."""
    vectors = [vector(100 + n, vllm.engine.facts.d_model, 6.0) for n in range(40)]
    programs = [compiled(vllm.engine, {"op": "add", "layers": [n % 6], "inline": {"vector": v.tolist()}})
                for n, v in enumerate(vectors)]
    found = await asyncio.gather(*(generate(vllm.engine, PROMPTS[n % 4], program, max_tokens=4)
                                   for n, program in enumerate(programs)))
    for n, (tokens, _) in enumerate(found):
        check(vllm.model, PROMPTS[n % 4], tokens, [ref.Edit("resid_post", n % 6, ref.add(vectors[n]), ref.everywhere)])


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("site", ["resid_post", "attn_out"])
async def test_an_overflow_in_vllm_stays_with_its_request(vllm: Group, site: str) -> None:
    def spec(strength: float) -> dict[str, Any]:
        return {"op": "add", "site": site, "layers": [2], "strength": strength,
                "inline": {"vector": [1.0] * vllm.engine.facts.d_model}}

    for _ in range(3):
        innocent, failed = await asyncio.gather(
            generate(vllm.engine, PROMPTS[0]), generate(vllm.engine, PROMPTS[1], compiled(vllm.engine, spec(3e38))),
            return_exceptions=True)
        assert not isinstance(innocent, BaseException)
        check(vllm.model, PROMPTS[0], innocent[0], ())
        assert isinstance(failed, SteeringOverflow) and f"{site} of layer 2" in failed.message
    _, touched = await generate(vllm.engine, PROMPTS[2], compiled(vllm.engine, spec(0.5)))
    assert 0 < (touched[0].largest_step or 0) < 10_000
