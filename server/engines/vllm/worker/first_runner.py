"""vLLM's first model runner, which a CPU gets.

`_update_states` brings and ends requests, `_prepare_inputs` lays out the batch, and `_model_forward` returns the final
hidden states.
"""

from typing import Any

import numpy as np
import torch

from server.engines.vllm.wire import carried_by
from server.engines.vllm.worker.runners import can_zero, restore_temperature, telling_faults
from server.engines.vllm.worker.steps import Steps


def bind_first(runner: Any, steps: Steps) -> None:
    update, prepare, forward = runner._update_states, runner._prepare_inputs, runner._model_forward

    def update_states(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        can_zero(runner, scheduled)
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
                    lambda: runner.input_ids.gpu[:total].cpu().numpy().astype(np.int64),
                    lambda row, start, stop: batch.token_ids_cpu[row, start:stop].tolist())
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
    runner.sample_tokens = telling_faults(_sparing_generators(runner, runner.discard_request_mask), steps)


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
