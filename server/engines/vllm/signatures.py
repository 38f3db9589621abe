"""The parts of vLLM that are wrapped, as they were when they were tested. They are private to vLLM, so its minor
version is pinned and their parameters are compared before anything is started.
"""

import inspect
from typing import Any

VLLM_VERSION = "0.32."


def check() -> None:
    """Compare what is wrapped with what was tested.

    Raises:
        RuntimeError: another version, or a signature that differs; naming it.
    """
    import vllm
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    if not vllm.__version__.startswith(VLLM_VERSION):
        raise RuntimeError(f"Trimtab steers vLLM {VLLM_VERSION}x, this is {vllm.__version__}")
    expect(Worker.load_model, "self", "load_dummy_weights")
    expect(GPUModelRunner._update_states, "self", "scheduler_output")
    expect(GPUModelRunner._prepare_inputs, "self", "scheduler_output", "num_scheduled_tokens")
    expect(GPUModelRunner._model_forward, "self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds",
           "model_kwargs")
    expect(GPUModelRunner.sample_tokens, "self", "grammar_output")
    expect(TopKTopPSampler.forward_native, "self", "logits", "generators", "k", "p")
    expect(Scheduler.schedule, "self", "throttle_prefills")
    expect(Scheduler.update_from_output, "self", "scheduler_output", "model_runner_output")
    expect(KVCacheManager.get_block_ids, "self", "request_id")
    expect(KVCacheManager.evict_blocks, "self", "block_ids")
    stretches = ("b_seq_start_loc", "seq_len_tensor", "lora_indices_tensor", "batches", "max_seq_length", "token_nums")
    weights = ("inputs", "lora_b_weights", "output_tensor")
    expect(punica_cpu.sgmv_expand, *weights, *stretches, "add_inputs")
    expect(punica_cpu.sgmv_expand_slice, *weights, *stretches, "slice_offset", "slice_size", "add_inputs")
    expect(kv_cache_utils.generate_block_hash_extra_keys, "request", "start_token_idx", "end_token_idx",
           "start_mm_idx")


def expect(function: Any, *names: str) -> None:
    """
    Raises:
        RuntimeError: `function` has other parameters than `names`. What Trimtab has wrapped already was checked then.
    """
    found = tuple(inspect.signature(function).parameters)
    if found != names and not getattr(function, "trimtab", False):
        raise RuntimeError(f"{function.__qualname__} of vLLM takes ({', '.join(found)}), "
                           f"not ({', '.join(names)}), which Trimtab was tested with")
