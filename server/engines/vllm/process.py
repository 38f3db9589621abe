"""Starting vLLM's AsyncLLM with Trimtab's plugin awake."""

import os
from typing import Any

import torch

from server.engines.vllm.arguments import check_arguments, check_resolved
from server.engines.vllm.manifest import Manifest
from server.engines.vllm.options import VllmOptions
from server.engines.vllm.plugin import MARKER
from server.engines.vllm.reading import ModelReading, engine_dtype
from server.engines.vllm.wire import EXTRA
from steering.errors import TrimtabError, UnsupportedModel

# Slots beside those of requests, for passes that measure.
MEASURE_SLOTS = 2


def build_manifest(options: VllmOptions, reading: ModelReading) -> Manifest:
    sites = tuple(site for site in options.sites if site in reading.facts.sites)
    graph_ops = options.graph_ops
    if graph_ops == "auto":
        graph_ops = "all" if torch.cuda.is_available() else "vectors"
    return Manifest.build(sites=sites, graph_sites=tuple(site for site in options.graph_sites if site in sites),
                          graph_ops=graph_ops, slots=options.slots + MEASURE_SLOTS, rows=options.rows,
                          depth=options.depth, rank=options.rank)


def context_of(options: VllmOptions, reading: ModelReading) -> int:
    """Tokens that prompt and completion of one request may have."""
    asked = options.extra.get("max_model_len", options.max_model_len)
    return min(reading.facts.context_length, options.kv_cache_tokens, asked or reading.facts.context_length)


def start_llm(options: VllmOptions, reading: ModelReading) -> Any:
    """An AsyncLLM in a process of its own, hooks attached.

    Raises:
        InvalidSettings: an argument of vLLM under which steering is not right.
        UnsupportedModel: vLLM does not start; with its reason.
    """
    check_arguments(options.extra)
    # One position more than the context: a pass that only scores still asks vLLM for a token.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from server.engines.vllm.plugin import check

    # Beside those of the setting: the block that vLLM holds back, and that of the position above.
    blocks = -(-options.kv_cache_tokens // options.block_size) + 2
    arguments: dict[str, Any] = {
        "model": options.model, "served_model_name": options.model_id, "dtype": engine_dtype(options),
        "max_num_seqs": options.max_requests, "max_num_batched_tokens": options.max_batch_tokens,
        "block_size": options.block_size,
        "enforce_eager": options.eager, "tensor_parallel_size": options.tensor_parallel,
        "enable_prefix_caching": options.share_prefixes, "enable_chunked_prefill": True,
        "scheduling_policy": "priority", "num_gpu_blocks_override": blocks,
        "additional_config": {EXTRA: build_manifest(options, reading).to_json()},
        "enable_log_requests": False,
        # Without this a model may fill its answer with white space, which every schema allows.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if torch.cuda.is_available():
        arguments["compilation_config"] = _split_graphs()
    else:
        arguments["kv_cache_memory_bytes"] = blocks * options.block_size * reading.kv_bytes_per_token
    arguments |= {**options.extra, "max_model_len": context_of(options, reading) + 1}
    # Processes of this engine inherit the marker; those of any other engine started from here must not.
    os.environ[MARKER] = "1"
    try:
        check()
        given = AsyncEngineArgs(**arguments)
        config = given.create_engine_config(UsageContext.ENGINE_CONTEXT)
        check_resolved(config, mixture=bool(reading.facts.num_experts))
        return AsyncLLM.from_vllm_config(config, usage_context=UsageContext.ENGINE_CONTEXT,
                                         disable_log_stats=given.disable_log_stats)
    except TrimtabError:
        raise
    except Exception as error:
        # vLLM raises many kinds; all of them mean that nothing can be served.
        raise UnsupportedModel(f"vLLM does not start: {error}", param="model") from error
    finally:
        os.environ.pop(MARKER, None)


def _split_graphs() -> dict[str, Any]:
    """CUDA graphs in pieces: the opaque ops are Python and must run between them, not be recorded once.

    The router's op runs inside vLLM's own op of a mixture, which is therefore left out of the pieces too.
    """
    from vllm.config import CompilationConfig

    stock = list(CompilationConfig._attention_ops)
    return {"cudagraph_mode": "PIECEWISE",
            "splitting_ops": [*stock, "trimtab::act", "vllm::moe_forward", "vllm::moe_forward_shared"]}
