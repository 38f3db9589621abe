"""What Trimtab adds to vLLM's scheduler: faulty requests are ended, and what they left in the cache is never used. Jobs
give way to requests (`guests.py`).

A worker names the requests that a step could not serve as they asked (`tally`). They are finished with an error before
a token of that step is delivered. From the faulty token on, their blocks hold other keys and values than their hash
says, or values that are not finite. Such blocks leave the prefix cache, and requests that share one are ended too. A
block is zeroed when another request gets it, because attention may read beyond a request's last token and multiply what
it finds by zero.
"""

from typing import Any

from server.engines.vllm.wire import FAULTS
from server.engines.vllm.worker import guests

_TAINTED = "_trimtab_tainted"


def wrap(scheduler_class: Any) -> None:
    """Does nothing the second time."""
    update, schedule = scheduler_class.update_from_output, scheduler_class.schedule
    if getattr(update, "trimtab", False):
        return

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        faults = getattr(model_runner_output, FAULTS, None)
        if faults:
            end_faulty(self, faults, model_runner_output)
        guests.stepped(self, scheduler_output)
        return update(self, scheduler_output, model_runner_output)

    def schedule_zeroing(self: Any, *args: Any, **kwargs: Any) -> Any:
        with guests.courtesy(self) as plan:
            scheduled = schedule(self, *args, **kwargs)
            plan(scheduled)
        tainted = getattr(self, _TAINTED, None)
        if tainted:
            found = tainted & new_blocks(scheduled)
            scheduled.new_block_ids_to_zero = [*(scheduled.new_block_ids_to_zero or ()), *sorted(found)] or None
            tainted -= found
        return scheduled

    update_from_output.trimtab = schedule_zeroing.trimtab = True  # type: ignore[attr-defined]
    scheduler_class.update_from_output, scheduler_class.schedule = update_from_output, schedule_zeroing


def end_faulty(scheduler: Any, faults: dict[str, int], output: Any) -> None:
    """faults: position of the first faulty token of each request."""
    manager, size = scheduler.kv_cache_manager, scheduler.cache_config.block_size
    poisoned: set[int] = set()
    for request_id, position in faults.items():
        if request_id in scheduler.requests:
            for group in manager.get_block_ids(request_id):
                poisoned.update(group[position // size:])
    manager.evict_blocks(poisoned)
    tainted: set[int] = getattr(scheduler, _TAINTED, set())
    setattr(scheduler, _TAINTED, tainted | poisoned)
    for request_id, request in scheduler.requests.items():
        sharing = any(not poisoned.isdisjoint(group) for group in manager.get_block_ids(request_id))
        if request.is_finished() or not (request_id in faults or sharing):
            continue
        index = output.req_id_to_index.get(request_id)
        if index is not None and output.sampled_token_ids:
            output.sampled_token_ids[index] = []
        # Requests in this set are finished with an error, whatever their state is.
        scheduler.grammar_compile_error_reqs.add(request_id)


def new_blocks(scheduled: Any) -> set[int]:
    """Blocks that a scheduler's output hands to requests."""
    given = [request.block_ids for request in scheduled.scheduled_new_reqs]
    given += [blocks for blocks in scheduled.scheduled_cached_reqs.new_block_ids if blocks is not None]
    return {block for blocks in given for group in blocks for block in group}
