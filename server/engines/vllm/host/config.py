"""From our options to vLLM's configuration. What vLLM refuses of them is told before a start, in a sentence."""

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from pydantic import ValidationError

from server.engines.vllm.host.arguments import check_arguments, check_resolved
from server.engines.vllm.host.lora import lora_arguments
from server.engines.vllm.host.options import VllmOptions
from server.engines.vllm.host.reading import ModelReading, engine_dtype
from server.engines.vllm.manifest import Manifest
from server.engines.vllm.plugin import MARKER
from server.engines.vllm.quiet import FUTURE, LEVEL, first_line, hold_back_warnings
from server.engines.vllm.signatures import check
from server.engines.vllm.wire import EXTRA
from server.errors import InvalidSettings
from steering.language.errors import UnsupportedModel

# Slots beside those of requests, for passes that measure.
MEASURE_SLOTS = 2


def build_manifest(options: VllmOptions, reading: ModelReading) -> Manifest:
    sites = tuple(site for site in options.sites if site in reading.facts.sites)
    graph_ops = options.graph_ops
    if graph_ops == "auto":
        graph_ops = "all" if torch.cuda.is_available() else "vectors"
    return Manifest.build(sites=sites, graph_sites=tuple(site for site in options.graph_sites if site in sites),
                          graph_ops=graph_ops, slots=options.slots + MEASURE_SLOTS, rows=options.rows,
                          depth=options.depth, rank=options.rank, kept_bytes=options.kept_bytes,
                          largest_step=options.step_limit.largest, step_action=options.step_limit.action)


def context_of(options: VllmOptions, reading: ModelReading) -> int:
    """Tokens that prompt and completion of one request may have."""
    asked = options.extra.get("max_model_len", options.max_model_len)
    return min(reading.facts.context_length, options.kv_cache_tokens, asked or reading.facts.context_length)


def check_names(options: VllmOptions) -> None:
    """What can be said of the arguments before the model is read.

    Raises:
        InvalidSettings: naming the first argument that vLLM does not have, or that Trimtab refuses.
    """
    hold_back_warnings()
    check_arguments(options.extra)
    if not options.extra:
        return
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in fields(AsyncEngineArgs)]
    for name in options.extra:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InvalidSettings(f"vLLM has no argument {name}", param=("vllm_args", name),
                                  fix=f"Did you mean {near[0]}?" if near else "Leave it out.")
    length = options.extra.get("max_model_len")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise InvalidSettings("max_model_len must be a whole number over 0", param=("vllm_args", "max_model_len"),
                              fix="Correct it, or leave it out.")


@contextmanager
def quiet() -> Iterator[None]:
    """Without vLLM's account of what it does, unless the operator asked for one: a start gives it again."""
    before = logging.root.manager.disable
    if LEVEL not in os.environ:
        logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def awake() -> Iterator[None]:
    """Processes of the engine that starts meanwhile inherit the plugin's marker; those of any other must not."""
    os.environ[MARKER] = "1"
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = FUTURE if before is None else f"{before},{FUTURE}"
    # One position more than the context: a pass that only scores still asks vLLM for a token.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    try:
        yield
    finally:
        os.environ.pop(MARKER, None)
        if before is None:
            os.environ.pop("PYTHONWARNINGS", None)
        else:
            os.environ["PYTHONWARNINGS"] = before


def engine_config(options: VllmOptions, reading: ModelReading) -> Any:
    """vLLM's configuration, checked as far as it can be without a start. To be called while `awake`.

    Raises:
        InvalidSettings: an argument that vLLM refuses, or under which steering is not right.
        UnsupportedModel: another vLLM than was tested.
    """
    hold_back_warnings()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    try:
        check()
    except RuntimeError as error:
        raise UnsupportedModel(f"vLLM does not start: {error}", param="model") from error
    given = engine_arguments(options, reading)

    def made(arguments: Mapping[str, Any]) -> Any:
        return AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)

    try:
        config = made(given)
    except Exception as error:
        # Validation of many kinds; all that went into it are settings and the model's own configuration.
        raise _refused(error, _guilty(made, given, options.extra)) from error
    check_resolved(config, mixture=bool(reading.facts.num_experts), adapters=options.takes_adapters)
    _check_start(config)
    return config


def engine_arguments(options: VllmOptions, reading: ModelReading) -> dict[str, Any]:
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
        # What vLLM makes of it on a CPU anyway, with a warning.
        arguments["mamba_ssm_cache_dtype"] = "float32"
    return arguments | lora_arguments(options) | {**options.extra, "max_model_len": context_of(options, reading) + 1}


def _split_graphs() -> dict[str, Any]:
    """CUDA graphs in pieces: the opaque ops are Python and must run between them, not be recorded once.

    The router's op runs inside vLLM's own op of a mixture, which is therefore left out of the pieces too.
    """
    from vllm.config import CompilationConfig

    stock = list(CompilationConfig._attention_ops)
    return {"cudagraph_mode": "PIECEWISE",
            "splitting_ops": [*stock, "trimtab::act", "vllm::moe_forward", "vllm::moe_forward_shared"]}


def _check_start(config: Any) -> None:
    """What vLLM would find out in its other processes, where only a traceback tells of it."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.platforms import current_platform
    from vllm.tokenizers import cached_tokenizer_from_config
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    parallel = config.parallel_config
    local = parallel.local_world_size * parallel.data_parallel_size_local
    spread = parallel.nnodes > 1 or parallel.distributed_executor_backend == "ray"
    devices = current_platform.device_count()
    if not current_platform.is_cpu() and not spread and local > devices:
        raise InvalidSettings(f"{local} ranks are more than the {devices} devices of this machine",
                              param=("vllm_args", "tensor_parallel_size"), fix="Use fewer ranks, or several machines.")
    try:
        get_model_loader(config.load_config)
        cached_tokenizer_from_config(config.model_config)
        block = config.cache_config.block_size
        if current_platform.is_cpu() and block % 32:
            raise ValueError(f"block_size must be a multiple of 32 on a CPU, not {block}")
    except Exception as error:
        raise _refused(error) from error
    try:
        # On a CPU a rank is bound to cores: one memory node each, unless the operator says which. Which of them a
        # replica has only its own process knows.
        if parallel.data_parallel_size == 1:
            OMPProcessManager(config)
    except Exception as error:
        raise InvalidSettings(
            f"the ranks do not fit this machine: {first_line(error)}", param=("vllm_args", "tensor_parallel_size"),
            fix="Use fewer ranks, or say in VLLM_CPU_OMP_THREADS_BIND which cores each has (0|1).") from error


def _guilty(made: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any], extra: Mapping[str, Any]) -> str | None:
    """The argument of the operator without which a configuration is made, if it is one alone."""
    for name in extra:
        try:
            made({other: value for other, value in given.items() if other != name})
        except Exception:
            # Refused again, for whatever reason: it was not this one, or not alone.
            continue
        return name
    return None


def _refused(error: Exception, name: str | None = None) -> InvalidSettings:
    said = first_line(error)
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        said = first["msg"].removeprefix("Value error, ").splitlines()[0]
        name = name or (str(first["loc"][0]) if first["loc"] else None)
    return InvalidSettings(f"vLLM refuses {name or 'its arguments'}: {said[:500]}",
                           param=("vllm_args", name) if name else "vllm_args",
                           fix="Correct TRIMTAB_VLLM_ARGS or the setting behind it.")
