"""vLLM's second model runner, which GPUs get.

`add_request` and `remove_request` of its model state bring and end requests, `prepare_inputs` lays out the batch, and
`execute_model` leaves the final hidden states.
"""

from typing import Any

import numpy as np
import torch

from server.engines.vllm.signatures import expect
from server.engines.vllm.worker.runners import can_zero, restore_temperature, telling_faults
from server.engines.vllm.worker.steps import Steps


def bind_second(runner: Any, steps: Steps) -> None:
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
                    lambda: batch.input_ids[:batch.num_tokens].cpu().numpy().astype(np.int64),
                    lambda row, start, stop: states.all_token_ids.gpu[
                        states.req_id_to_index[batch.req_ids[row]], start:stop].tolist())
        return prepare(batch, states)

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        can_zero(runner, args[0] if args else kwargs.get("scheduler_output"))
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
    runner.sample_tokens = telling_faults(runner.sample_tokens, steps)
