"""The stock batcher of transformers: what of it is used, what is expected of that, and the manager as it is run here.

Some of what is wrapped is private to transformers. Signatures are checked before anything starts; what does not match
stops the start by its name, and a spec is never ignored.
"""

import inspect
import threading
from collections.abc import Callable
from typing import Any

import transformers
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import CacheAllocator
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler, Scheduler

from steering.language.errors import UnsupportedModel

VERSION = "5.19."
EXPECTED: tuple[tuple[type, str, tuple[str, ...]], ...] = (
    (BackgroundThreadStatus, "request_stop", ("self", "status", "global_rank")),
    (CacheAllocator, "allocate_cache_to_request", ("self", "request_id", "past_length", "query_length")),
    (CacheAllocator, "free_blocks", ("self", "request_id", "no_cache")),
    (CacheAllocator, "mark_complete_blocks", ("self", "request_id", "token_ids", "new_new_blocks")),
    (CacheAllocator, "needs_new_blocks", ("self", "request_id", "past_length", "query_length")),
    (ContinuousBatchProcessor, "_generation_step", ("self", "model")),
    (ContinuousBatchProcessor, "prepare_next_batch", ("self",)),
    (ContinuousBatchProcessor, "update_batch", ("self",)),
    (ContinuousBatchingIOs, "prepare_batch_tensors", (
        "self", "requests_in_batch", "logits_processors", "use_decode_fast_path", "num_q_tokens", "max_kv_read",
        "use_padding")),
    (ContinuousBatchingIOs, "prepare_batch_update", ("self",)),
    (ContinuousBatchingManager, "_create_batch_processor", ("self",)),
    (ContinuousBatchingManager, "_fail_all_remaining_requests", ("self", "error", "batch_processor")),
    (ContinuousBatchingManager, "_run_generation_loop", ("self",)),
    (ContinuousBatchingManager, "add_request", (
        "self", "input_ids", "request_id", "max_new_tokens", "streaming", "record_timestamps", "eos_token_id",
        "logit_processor_kwargs")),
    (ContinuousBatchingManager, "cancel_request", ("self", "request_id")),
    (ContinuousBatchingManager, "pause", ("self",)),
    (ContinuousBatchingManager, "start", ("self",)),
    (ContinuousBatchingManager, "stop", ("self", "block", "timeout", "keep_for_next_session", "hard_stop")),
    (FIFOScheduler, "schedule_batch", ("self", "token_budget", "cache_budget")),
    (FutureRequestState, "__init__", ("self", "state", "has_new_token", "complete_blocks", "query_length")),
    (ModelRunner, "_sample", ("self", "scores", "output_ids")),
    (OutputRouter, "deliver", ("self", "output")),
    (OutputRouter, "deliver_batch", ("self", "outputs")),
    (PagedAttentionCache, "mark_complete_blocks", ("self", "state", "complete_blocks")),
    (PagedAttentionCache, "search_prefix_match", ("self", "request_id", "prompt_ids")),
    (PagedAttentionCache, "update", ("self", "key_states", "value_states", "layer_idx", "kwargs")),
    (RequestState, "create_equivalent_initial_request", ("self",)),
    (Scheduler, "add_waiting_request", ("self", "state")),
    (Scheduler, "clear_cancelled_requests", ("self",)),
    (Scheduler, "finish_request", ("self", "request_id")),
)
# Attributes that are read or written, by the part of a batch processor that has them.
TABLES = {
    "scheduler": ("active_requests", "waiting_requests", "waiting_requests_order", "block_new_requests",
                  "_requests_to_cancel", "_cancellation_lock", "max_requests_per_batch"),
    "inputs_and_outputs": ("requests_in_batch", "num_request_in_batch"),
    "cache": ("cache_allocators", "num_blocks", "allow_block_sharing"),
}


def check_stock() -> None:
    """Compare what is wrapped with what was tested.

    Raises:
        UnsupportedModel: another version, or a signature that differs; naming it.
    """
    if not transformers.__version__.startswith(VERSION):
        raise _changed(f"Trimtab steers transformers {VERSION}x, this is {transformers.__version__}")
    for owner, method, names in EXPECTED:
        function = getattr(owner, method, None)
        if function is None:
            raise _changed(f"{owner.__name__} of transformers has no {method}, which Trimtab was tested with")
        found = tuple(inspect.signature(function).parameters)
        if found != names:
            raise _changed(f"{owner.__name__}.{method} of transformers takes ({', '.join(found)}), "
                           f"not ({', '.join(names)}), which Trimtab was tested with")


def check_processor(processor: Any) -> None:
    """The same for the tables of a batch processor.

    Raises:
        UnsupportedModel: one is missing; naming it.
    """
    for part, names in TABLES.items():
        for name in names:
            if not hasattr(getattr(processor, part), name):
                raise _changed(f"{type(getattr(processor, part)).__name__} of transformers has no {name}, which "
                               "Trimtab was tested with")


def _changed(message: str) -> UnsupportedModel:
    return UnsupportedModel(message, fix=f"Install transformers {VERSION}x.")


class Manager(ContinuousBatchingManager):
    """The stock manager. `bind` is called with each batch processor that it makes.

    When its loop ends, for whatever reason, requests are left as they are: who started it knows better whom to tell.
    """

    def __init__(self, bind: Callable[[Any], None], router: OutputRouter, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._bind = bind
        self._bound: Any = None
        self.output_router = router

    def start(self) -> None:
        self.background_thread_status.clear()
        # Stock it would keep the process from ending, also when it hangs.
        thread = threading.Thread(target=self._run_generation_loop, name="trimtab-engine", daemon=True)
        self._generation_thread = thread  # type: ignore[assignment]
        thread.start()

    def end_soon(self) -> None:
        """Ask the loop to end after the step that it is in."""
        self.background_thread_status.request_stop(BackgroundThreadStatus.HARD_STOP, 0)
        self._wake_up_loop.set()

    def _create_batch_processor(self) -> Any:
        # The stock method hands an existing processor out again, reset.
        processor = super()._create_batch_processor()
        if processor is not self._bound:
            check_processor(processor)
            self._bind(processor)
            self._bound = processor
        return processor

    def _fail_all_remaining_requests(self, error: Exception, batch_processor: Any) -> None:
        return
