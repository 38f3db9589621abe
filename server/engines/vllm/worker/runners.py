"""What both model runners of vLLM are given: faults named in their output, temperatures as they were asked for, and
blocks that are zeroed.
"""

from typing import Any

from server.engines.vllm.wire import FAULTS, carried_by
from server.engines.vllm.worker.readout import Readout
from server.engines.vllm.worker.steps import Steps


def telling_faults(sample: Any, steps: Steps) -> Any:
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


def restore_temperature(sampling: Any) -> None:
    """Give a request the temperature that it asked for, in the place of the least one that vLLM takes."""
    asked = carried_by(sampling).get("temperature")
    if asked is not None:
        sampling.temperature = asked


def can_zero(runner: Any, scheduled: Any) -> None:
    """Blocks that a faulty request has left are to be zeroed; on a GPU vLLM prepares for that only where a model needs
    it anyway."""
    if not getattr(scheduled, "new_block_ids_to_zero", None) or runner.device.type == "cpu":
        return
    if getattr(runner, "_kv_block_zeroer", None) is None and getattr(runner, "kv_block_zeroer", None) is None:
        runner._init_kv_zero_meta()
