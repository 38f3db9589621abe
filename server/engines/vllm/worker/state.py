"""What Trimtab keeps in a vLLM worker: made when the model has been loaded, before its first forward is traced."""

from typing import Any

from server.engines.vllm.manifest import Manifest
from server.engines.vllm.wire import EXTRA
from server.engines.vllm.worker.adapters import spare_others
from server.engines.vllm.worker.attach import Hooks
from server.engines.vllm.worker.first_runner import bind_first
from server.engines.vllm.worker.ops import Split
from server.engines.vllm.worker.second_runner import bind_second
from server.engines.vllm.worker.steps import Steps
from server.engines.vllm.worker.tables import GraphTables
from steering.models.blocks import family_named

# Rows of padding that a step's buffers may have over the scheduler's limit.
PADDING = 1024


class WorkerState:
    """Of one worker, from `attach` on."""

    def __init__(self, worker: Any, manifest: Manifest) -> None:
        runner = worker.model_runner
        config = runner.vllm_config
        device = runner.device
        self.worker = worker
        self.graph = GraphTables(
            manifest.slots, num_rows=manifest.rows, depth=manifest.depth, rank=manifest.rank,
            max_tokens=config.scheduler_config.max_num_batched_tokens + PADDING, dtype=config.model_config.dtype,
            device=device, limit=manifest.limit, poisoning=not _is_last())
        self.steps = Steps(manifest.slots, device, self.graph, manifest.kept_bytes)
        split = _split()
        self.rank = split.rank
        self.hooks = Hooks(runner.get_model(), self.steps, self.graph, manifest.sites, manifest.graph_sites,
                           manifest.graph_ops, split, int(config.model_config.get_hidden_size()),
                           family_named(config.model_config.hf_config.model_type))


def attach(worker: Any) -> None:
    """Called after a worker has loaded its model and before the first forward. Does nothing without a manifest."""
    given = (worker.vllm_config.additional_config or {}).get(EXTRA)
    if given is None:
        return
    if worker.vllm_config.lora_config is not None and worker.model_runner.device.type == "cpu":
        spare_others()
    state = WorkerState(worker, Manifest.from_json(given))
    worker.trimtab = state
    if worker.use_v2_model_runner:
        bind_second(worker.model_runner, state.steps)
    else:
        bind_first(worker.model_runner, state.steps)


def _split() -> Split:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return Split(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())


def _is_last() -> bool:
    """Whether this worker has the end of the pipeline, and so the scheduler's ear."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)
