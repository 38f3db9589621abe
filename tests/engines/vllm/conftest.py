"""vLLM engines on the lab models: each takes half a minute to start, so the tests of a module share one per group."""

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from lab import model_path
from server.engines.vllm.engine import VllmEngine
from server.engines.vllm.options import VllmOptions

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


GROUPS = {
    "dense-compiled": ("lab-dense", {}),
    "dense-eager": ("lab-dense", {"eager": True}),
    "moe-compiled": ("lab-moe", {}),
    "moe-eager": ("lab-moe", {"eager": True}),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group(request: pytest.FixtureRequest) -> AsyncIterator[Group]:
    name, changes = GROUPS[request.param]
    engine = VllmEngine(options(name, **changes))
    await engine.start()
    try:
        yield Group(name, engine, AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.float32).eval())
    finally:
        await engine.stop()
