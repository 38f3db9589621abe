"""What Trimtab adds to a vLLM worker: hooks after loading, the state of each step, and methods for `collective_rpc`.

Both model runners are bound. V1: `_update_states` brings and ends requests, `_prepare_inputs` lays out the batch,
`_model_forward` returns the final hidden states. V2: `model_state.add_request`, `remove_request`, `prepare_inputs` and
`execute_model` do the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from server.engines.vllm.attach import Hooks
from server.engines.vllm.graph import GraphTables
from server.engines.vllm.manifest import Manifest
from server.engines.vllm.ops import Split
from server.engines.vllm.plugin import expect
from server.engines.vllm.steps import Kept, Steps
from server.engines.vllm.tally import Readout
from server.engines.vllm.wire import EXTRA, FAULTS, Key, carried_by, decode_program
from steering.divergence import Divergence, divergence, residual_shift
from steering.models.blocks import family_named

ROWS_AT_ONCE = 128
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
        self.steps = Steps(manifest.slots, device, self.graph)
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
    state = WorkerState(worker, Manifest.from_json(given))
    worker.trimtab = state
    if worker.use_v2_model_runner:
        _bind_v2(worker.model_runner, state.steps)
    else:
        _bind_v1(worker.model_runner, state.steps)


def _split() -> Split:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return Split(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())


def _is_last() -> bool:
    """Whether this worker has the end of the pipeline, and so the scheduler's ear."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def _bind_v1(runner: Any, steps: Steps) -> None:
    update, prepare, forward = runner._update_states, runner._prepare_inputs, runner._model_forward

    def update_states(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        _can_zero(runner, scheduled)
        for request_id in scheduled.finished_req_ids:
            steps.drop(request_id)
        for request in scheduled.scheduled_new_reqs:
            restore_temperature(request.sampling_params)
            steps.add(request.req_id, request.sampling_params)
        updated = update(scheduled, *args, **kwargs)
        for request in scheduled.scheduled_new_reqs:
            _catch_up(runner, request.req_id, request.sampling_params)
        return updated

    def prepare_inputs(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(scheduled, *args, **kwargs)
        batch = runner.input_batch
        count, total = batch.num_reqs, scheduled.total_num_scheduled_tokens
        steps.begin(batch.req_ids, runner.query_start_loc.np[:count + 1].astype(np.int64),
                    batch.num_computed_tokens_cpu[:count].astype(np.int64), total,
                    lambda: runner.input_ids.gpu[:total].cpu().numpy().astype(np.int64))
        return prepared

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hidden = output if isinstance(output, torch.Tensor) else None
        if steps.stretches and hidden is not None:
            steps.end(hidden)
        steps.collect(hidden)
        steps.done()
        return output

    runner._update_states, runner._prepare_inputs, runner._model_forward = update_states, prepare_inputs, model_forward
    runner.sample_tokens = _telling_faults(_sparing_generators(runner, runner.discard_request_mask), steps)


def _telling_faults(sample: Any, steps: Steps) -> Any:
    """`sample_tokens` whose output names the requests of the step that are to be ended."""

    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        output, readout = sample(*args, **kwargs), steps.readout
        steps.readout = None
        if output is None or readout is None:
            return output
        if hasattr(output, "get_output"):
            # Of vLLM's own wait for the device: ours is over by then.
            wait = output.get_output
            output.get_output = lambda: _with_faults(wait(), steps, readout)
            return output
        return _with_faults(output, steps, readout)

    return sample_tokens


def _with_faults(output: Any, steps: Steps, readout: Readout) -> Any:
    faults = steps.tallies.settle(readout)
    if faults:
        setattr(output, FAULTS, faults)
    return output


def _sparing_generators(runner: Any, discarded: Any) -> Any:
    """`sample_tokens` that makes no draw from a seed's generator for a token that is thrown away, as every part of a
    prompt but the last has one.

    vLLM draws and then winds the generator back, which one of the CPU cannot do: it raises, and the engine dies.
    """
    sample = runner.sample_tokens

    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        generators = batch.generators
        rows = np.nonzero(discarded.np[:batch.num_reqs])[0].tolist()
        spared = {row: generators.pop(row) for row in rows
                  if row in generators and generators[row].device.type == "cpu"}
        try:
            return sample(*args, **kwargs)
        finally:
            generators.update(spared)

    return sample_tokens


def restore_temperature(sampling: Any) -> None:
    """Give a request the temperature that it asked for, in the place of the least one that vLLM takes."""
    asked = carried_by(sampling).get("temperature")
    if asked is not None:
        sampling.temperature = asked


def _catch_up(runner: Any, request_id: str, sampling: Any) -> None:
    """Draw what a seeded completion drew for the tokens that it goes on from, by the sampler itself.

    The second runner places every draw by its position, so there nothing is to be done.
    """
    count, generator = carried_by(sampling).get("generated", 0), runner.requests[request_id].generator
    if not count or generator is None:
        return
    logits = torch.zeros(1, runner.model_config.get_vocab_size(), device=runner.device)
    for _ in range(count):
        runner.sampler.topk_topp_sampler(logits, {0: generator}, None, None)


def _bind_v2(runner: Any, steps: Steps) -> None:
    model_state = runner.model_state
    add, remove, prepare = model_state.add_request, model_state.remove_request, model_state.prepare_inputs
    execute = runner.execute_model
    expect(add, "req_index", "new_req_data")
    expect(remove, "req_id")
    expect(prepare, "input_batch", "req_states")

    def add_request(index: int, request: Any) -> Any:
        restore_temperature(request.sampling_params)
        steps.add(request.req_id, request.sampling_params)
        return add(index, request)

    def remove_request(request_id: str) -> Any:
        steps.drop(request_id)
        return remove(request_id)

    def prepare_inputs(batch: Any, states: Any) -> Any:
        count = len(batch.req_ids)
        steps.begin(batch.req_ids, np.asarray(batch.query_start_loc_np[:count + 1], dtype=np.int64),
                    np.asarray(batch.num_computed_tokens_np[:count], dtype=np.int64), int(batch.num_tokens),
                    lambda: batch.input_ids[:batch.num_tokens].cpu().numpy().astype(np.int64))
        return prepare(batch, states)

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        _can_zero(runner, args[0] if args else kwargs.get("scheduler_output"))
        output = execute(*args, **kwargs)
        state = runner.execute_model_state
        hidden = None if state is None or not isinstance(state.hidden_states, torch.Tensor) else state.hidden_states
        if steps.stretches and hidden is not None:
            steps.end(hidden)
        steps.collect(hidden)
        steps.done()
        return output

    model_state.add_request, model_state.remove_request = add_request, remove_request
    model_state.prepare_inputs, runner.execute_model = prepare_inputs, execute_model
    runner.sample_tokens = _telling_faults(runner.sample_tokens, steps)


def _can_zero(runner: Any, scheduled: Any) -> None:
    """Blocks that a faulty request has left are to be zeroed; on a GPU vLLM prepares for that only where a model needs
    it anyway."""
    if not getattr(scheduled, "new_block_ids_to_zero", None) or runner.device.type == "cpu":
        return
    if getattr(runner, "_kv_block_zeroer", None) is None and getattr(runner, "kv_block_zeroer", None) is None:
        runner._init_kv_zero_meta()


# Methods that the engine calls on every worker; set on vLLM's Worker class by the plugin.

def trimtab_describe(self: Any) -> dict[str, Any]:
    """What was hooked, on this rank."""
    state: WorkerState = self.trimtab
    from vllm.compilation.counter import compilation_counter

    nbytes = state.graph.nbytes + sum(table.nbytes for table in state.steps.tables.values())
    return {"places": [[site, layer] for site, layer in state.hooks.found],
            "graph": {site: place.ops for (site, _), place in state.graph.places.items()}, "bytes": nbytes,
            "steps": state.steps.num_steps, "v2": bool(self.use_v2_model_runner),
            "graphs_loaded": compilation_counter.num_aot_artifacts_loaded,
            "dtype": str(self.vllm_config.model_config.dtype).removeprefix("torch.")}


def trimtab_place(self: Any, slot: int, program: bytes) -> tuple[bool, str | None]:
    """Put a program into a slot. Whether the compiled graph carries it out, and the digest of what is there now."""
    state: WorkerState = self.trimtab
    rows = decode_program(program)
    # In a pipeline the rest of the program is for other ranks.
    here = set(state.hooks.found)
    own = tuple({key: row for key, row in by_key.items() if key in here} for by_key in rows.rows)
    in_graph = state.steps.place(slot, replace(rows, rows=own))
    return in_graph, state.steps.holds(slot)


def trimtab_taken(self: Any, names: Sequence[str]) -> list[dict[str, Any] | None] | None:
    """What requests did on the layers of this worker, by their names; None on ranks that share layers with another."""
    state: WorkerState = self.trimtab
    return None if state.rank else state.steps.tallies.take(names)


def trimtab_forget(self: Any, tags: Sequence[str]) -> None:
    """Drop what was kept and captured under `tags`."""
    for tag in tags:
        self.trimtab.steps.kept.pop(tag, None)
        self.trimtab.steps.captured.pop(tag, None)


def trimtab_scores(self: Any, tag: str, token_ids: Sequence[int], full: bool) -> list[Any] | None:
    """Log-probabilities of a kept pass: that of each token after the first, and all of them if `full`.

    None on ranks of a pipeline that do not have its end.
    """
    state: WorkerState = self.trimtab
    if tag not in state.steps.kept:
        return None
    _, hidden = _taken(state.steps.kept, tag)
    chosen: list[torch.Tensor] = []
    everything: list[torch.Tensor] = []
    targets = torch.tensor([*token_ids[1:], 0], device=hidden.device)
    for i in range(0, len(hidden), ROWS_AT_ONCE):
        logits = _logits(self, hidden[i:i + ROWS_AT_ONCE])
        if logits is None:
            continue
        logprobs = logits.float().log_softmax(-1)
        chosen.append(logprobs.gather(1, targets[i:i + ROWS_AT_ONCE].unsqueeze(1)).squeeze(1).cpu())
        if full:
            everything.append(logprobs.cpu())
    if not chosen:
        return None
    return [_bytes(torch.cat(chosen)), _bytes(torch.cat(everything)) if full else b""]


def trimtab_next(self: Any, tags: Sequence[str]) -> bytes | None:
    """Log-probabilities of what follows each of some kept passes, `[len(tags), vocab_size]`; drops them."""
    state: WorkerState = self.trimtab
    if not set(tags) <= state.steps.kept.keys():
        return None
    rows = torch.cat([_taken(state.steps.kept, tag)[1][-1:] for tag in tags])
    parts = [logits.float().log_softmax(-1) for i in range(0, len(rows), ROWS_AT_ONCE)
             if (logits := _logits(self, rows[i:i + ROWS_AT_ONCE])) is not None]
    return _bytes(torch.cat(parts).cpu()) if parts else None


def trimtab_compare(self: Any, tag: str, other: str, token_ids: Sequence[int], residual: int | None,
                    ends: Sequence[int]) -> Any:
    """Divergence of two kept passes that predict `token_ids`, and if `residual` names a layer the shift of its stream.

    Keeps `tag` for further comparisons and drops `other`.
    """
    state: WorkerState = self.trimtab
    if tag not in state.steps.kept:
        return None
    steered, base = state.steps.kept[tag].joined()[1], _taken(state.steps.kept, other)[1]
    chosen = torch.tensor(token_ids, device=steered.device)
    parts: list[Divergence] = []
    for i in range(0, len(chosen), ROWS_AT_ONCE):
        block = slice(i, i + ROWS_AT_ONCE)
        ours, theirs = _logits(self, steered[block]), _logits(self, base[block])
        if ours is not None and theirs is not None:
            parts.append(divergence(ours, theirs, chosen[block], ends))
    shift = None
    if residual is not None:
        key: Key = ("resid_post", residual)
        here, there = state.steps.captured[tag][key].joined()[1], state.steps.captured[other][key].joined()[1]
        moved = residual_shift(here, there)
        shift = [_bytes(moved.relative), _bytes(moved.cosine)]
    state.steps.captured.pop(other, None)
    if not parts:
        return None
    whole = Divergence.join(parts)
    return [{name: _bytes(value.float().cpu()) for name, value in vars(whole).items()}, shift]


def trimtab_captured(self: Any, tag: str) -> list[list[Any]]:
    """Activations of a capturing pass: site, layer, number of rows, float32 bytes."""
    state: WorkerState = self.trimtab
    found = []
    for (site, layer), kept in state.steps.captured.pop(tag, {}).items():
        rows = kept.joined()[1]
        found.append([site, layer, len(rows), _bytes(rows)])
    return found


def _taken(kept: dict[str, Kept], tag: str) -> Any:
    return kept.pop(tag).joined()


@torch.inference_mode()
def _logits(worker: Any, hidden: torch.Tensor) -> torch.Tensor | None:
    """None on ranks that do not hold the gathered logits."""
    logits: torch.Tensor | None = worker.model_runner.get_model().compute_logits(hidden)
    return logits


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().float().numpy().tobytes()


RPC = (trimtab_describe, trimtab_place, trimtab_taken, trimtab_forget, trimtab_scores, trimtab_next, trimtab_compare,
       trimtab_captured)
