"""vLLM engines on the lab models: each takes half a minute to start, so the tests of a module share one per group."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from lab import model_path
from server.engines.vllm.host.engine import VllmEngine
from server.engines.vllm.host.options import VllmOptions

pytest.importorskip("vllm", reason="the vLLM engine needs vLLM, which has no build for this platform")

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
torch.set_num_threads(1)


def options(name: str, **changes: Any) -> VllmOptions:
    """Small batches, so that prompts of the tests are prefilled in chunks."""
    settings: dict[str, Any] = {"kv_cache_tokens": 4096, "max_requests": 32, "slots": 32, "max_batch_tokens": 64}
    return VllmOptions(model=str(model_path(name)), model_id=name, **settings | changes)


@dataclass(frozen=True)
class Group:
    """One engine and the same weights in transformers."""

    name: str
    engine: VllmEngine
    model: Any


# Compiled in both forms of the graph: all that it can hold, and what is the default on a CPU.
GROUPS = {
    "dense-compiled": ("lab-dense", {"graph_ops": "all"}),
    "dense-eager": ("lab-dense", {"eager": True}),
    "moe-compiled": ("lab-moe", {"graph_ops": "vectors"}),
    "moe-eager": ("lab-moe", {"eager": True}),
}


# A cache of 12 blocks for requests of up to 256 tokens: a dozen completions at once are too many for it.
TIGHT: dict[str, Any] = {"kv_cache_tokens": 384, "max_model_len": 256}
# The worker in the process of vLLM's scheduler: one process less to start, where processes are not what is tested.
ONE_PROCESS: dict[str, Any] = {"extra": {"distributed_executor_backend": "uni"}}


@asynccontextmanager
async def running(name: str, **changes: Any) -> AsyncIterator[Group]:
    """A started engine on a lab model."""
    engine = VllmEngine(options(name, **changes))
    with pytest.MonkeyPatch.context() as patch:
        if changes.get("extra") == ONE_PROCESS["extra"]:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        await engine.start()
    try:
        yield Group(name, engine, AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.float32).eval())
    finally:
        await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group(request: pytest.FixtureRequest) -> AsyncIterator[Group]:
    name, changes = GROUPS[request.param]
    async with running(name, **changes) as started:
        yield started
