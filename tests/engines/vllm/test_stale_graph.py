"""A compiled graph from vLLM's cache that knows nothing of the hooks: kept away by the manifest, noticed if not.

On the CPU vLLM keeps no graphs, so its compiler for GPUs is turned on here: pieces split at attention, artifacts on
disk. The model is a random one of one layer.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lab import model_path
from server.engines.vllm.host.engine import VllmEngine
from server.engines.vllm.host.options import VllmOptions
from steering.language.errors import UnsupportedModel
from tests.engines import reference as ref
from tests.engines.cases import vector
from tests.engines.conftest import compiled, generate
from tests.engines.vllm import checks
from tests.engines.vllm.conftest import Group
from tests.tiny import tiny

PLUGIN = Path(__file__).parent / "compiling"
PROMPT = [3 + (7 * t) % 90 for t in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny("qwen3", head_dim=32, num_hidden_layers=1).save_pretrained(folder)
    for path in model_path("lab-dense").glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """vLLM's piecewise compiler on the CPU, with a cache of its own."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        stock(cls, config)
        compilation = config.compilation_config
        compilation.mode = CompilationMode.VLLM_COMPILE
        compilation.compile_sizes = []
        compilation.splitting_ops = list(compilation._attention_ops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
        # Processes that are spawned from here have this path.
        patch.setattr(sys, "path", [str(PLUGIN), *sys.path])
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield patch


def engine_on(model: Path, **changes: Any) -> VllmEngine:
    settings: dict[str, Any] = {"extra": {"distributed_executor_backend": "uni", "compilation_config": {"mode": 3}}}
    return VllmEngine(VllmOptions(
        model=str(model), model_id="tiny", slots=4, max_requests=4, max_batch_tokens=64, max_model_len=128,
        kv_cache_tokens=256, sites=("resid_post",), **settings | changes))


def graphs(root: Path) -> set[tuple[Path, int]]:
    """Compiled models in the cache, with the time each was written. Small kernels of vLLM's own are beside them."""
    found = (root / "cache" / "torch_compile_cache").glob("torch_aot_compile/*/rank_*/model")
    return {(path, path.stat().st_mtime_ns) for path in found}


@pytest.mark.slow
async def test_a_graph_without_hooks_is_refused_and_compiled_anew(model: Path, compiler: pytest.MonkeyPatch,
                                                                  tmp_path: Path) -> None:
    # A graph without hooks gets into the cache, under a hash that does not know of them.
    compiler.setenv("TRIMTAB_TEST_FAULTS", "no_hooks,no_manifest")
    poisoning = engine_on(model, self_test=False)
    await poisoning.start()
    assert (await poisoning.connection.rpc("trimtab_describe"))[0]["places"] == []
    await generate(poisoning, PROMPT)
    await poisoning.stop()
    stale = graphs(tmp_path)
    assert len(stale) == 1, "vLLM has compiled nothing, or not for its cache"

    # Control: with the manifest left out of the hash that graph is loaded, and the self-test refuses it.
    compiler.setenv("TRIMTAB_TEST_FAULTS", "no_manifest")
    poisoned = engine_on(model)
    with pytest.raises(UnsupportedModel, match=r"resid_post\[0\] changes nothing") as refused:
        await poisoned.start()
    assert not poisoned.alive
    assert "VLLM_CACHE_ROOT" in str(refused.value.fix)
    assert graphs(tmp_path) == stale, "it was compiled again; the control shows nothing"

    # With the manifest in the hash the same cache does no harm.
    compiler.delenv("TRIMTAB_TEST_FAULTS")
    honest = engine_on(model)
    await honest.start()
    try:
        assert len(graphs(tmp_path) - stale) == 1 and graphs(tmp_path) > stale
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        push = vector(1, honest.facts.d_model, 4.0)
        spec = {"op": "add", "layers": [0], "inline": {"vector": push.tolist()}}
        tokens, _ = await generate(honest, PROMPT, compiled(honest, spec))
        checks.check_tokens(Group("tiny", honest, reference), PROMPT, tokens,
                            [ref.Edit("resid_post", 0, ref.add(push), ref.everywhere)], steered=True)
    finally:
        await honest.stop()


@pytest.mark.slow
async def test_a_graph_of_the_cpu_is_compiled_once_and_right_when_it_comes_from_the_cache(
        model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default mode on a CPU, whose graphs vLLM itself writes and never reads. Other hooks are another graph."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded = []
    for graph_ops in ("vectors", "vectors", "all"):
        engine = engine_on(model, graph_ops=graph_ops, extra={"distributed_executor_backend": "uni"})
        await engine.start()
        try:
            loaded.append((await engine.connection.rpc("trimtab_describe"))[0]["graphs_loaded"])
            push = vector(1, engine.facts.d_model, 4.0)
            spec = {"op": "add", "layers": [0], "inline": {"vector": push.tolist()}}
            tokens, _ = await generate(engine, PROMPT, compiled(engine, spec))
            checks.check_tokens(Group("tiny", engine, reference), PROMPT, tokens,
                                [ref.Edit("resid_post", 0, ref.add(push), ref.everywhere)], steered=True)
        finally:
            await engine.stop()
    assert loaded == [0, 1, 0]
