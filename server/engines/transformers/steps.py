"""What Trimtab adds to each step of transformers' continuous batching.

The stock engine is not forked: five bound methods of one batch processor are wrapped when it is made (`bind`).
  prepare_batch_tensors  knows which tokens of which requests come next -> the steering plan of the batch
  _generation_step       runs the forward pass -> the plan is carried out around it
  _sample                has the logits -> tokens per request's own settings and seed
  search_prefix_match, mark_complete_blocks  hash token ids for prefix sharing -> ids salted by what a program did
  clear_cancelled_requests  drops requests -> their slots come free
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState

from server.engines.arena import Arena
from server.engines.transformers.running import EngineCompletion, Running, SaltedIds
from server.engines.transformers.sampler import sample
from steering.bank import Bank
from steering.plan import StepPlan
from steering.steerer import Steerer


class Steps:
    """Running completions and the steps they take part in. `on_retired` is called from the engine's thread."""

    def __init__(self, steerer: Steerer, bank: Bank, on_retired: Callable[[Running], None]) -> None:
        self.steerer = steerer
        self.bank = bank
        self.completions: dict[str, EngineCompletion] = {}
        self._on_retired = on_retired
        self._lock = threading.Lock()
        self._arena = Arena()
        # One row per running completion: slot, where its bits begin, tokens processed.
        self._row_of: dict[str, int] = {}
        self._table = np.zeros((64, 3), dtype=np.int64)
        self._free_rows = list(range(63, -1, -1))
        self._num_steered = 0
        self._plan: StepPlan = {}
        self._sampling: list[Running] = []

    # Admission and end, called with the request's slot already pinned.

    def add(self, completion: EngineCompletion) -> None:
        running = completion.running
        with self._lock:
            if running.touch is not None:
                running.base = self._arena.put(running.touch.on, running.touch.off)
                self._num_steered += 1
            if not self._free_rows:
                size = len(self._table)
                self._table = np.concatenate([self._table, np.zeros_like(self._table)])
                self._free_rows = list(range(2 * size - 1, size - 1, -1))
            row = self._free_rows.pop()
            self._table[row] = (running.slot, running.base, 0)
            self._row_of[running.request_id] = row
            self.completions[running.request_id] = completion

    def retire(self, request_id: str) -> None:
        """Forget a completion and free what it holds. Does nothing for one that is gone already."""
        with self._lock:
            completion = self.completions.pop(request_id, None)
            if completion is None:
                return
            running = completion.running
            row = self._row_of.pop(request_id)
            running.processed = int(self._table[row, 2])
            self._free_rows.append(row)
            if running.touch is not None:
                self._arena.drop(running.base, len(running.touch.on))
                self._num_steered -= 1
        self._on_retired(running)

    def processed(self, running: Running) -> int:
        """Tokens of the completion that went through the model."""
        with self._lock:
            row = self._row_of.get(running.request_id)
            return running.processed if row is None else int(self._table[row, 2])

    # The steps, called from the engine's thread.

    def bind(self, processor: Any) -> None:
        """Wrap the methods of a fresh batch processor."""
        ios, cache = processor.inputs_and_outputs, processor.cache
        prepare, step = ios.prepare_batch_tensors, processor._generation_step
        search, clear = cache.search_prefix_match, processor.scheduler.clear_cancelled_requests

        def prepare_batch_tensors(requests_in_batch: list[FutureRequestState], *args: Any, **kwargs: Any) -> None:
            self._prepare(requests_in_batch)
            prepare(requests_in_batch, *args, **kwargs)

        def generation_step(model: Any) -> None:
            with self.steerer.acting(self._plan):
                step(model)

        def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
            matched: int = search(request_id, self._salted(request_id, prompt_ids))
            return matched

        def clear_cancelled_requests() -> Any:
            cancelled = clear()
            for state in cancelled:
                self.retire(state.request_id)
            return cancelled

        ios.prepare_batch_tensors = prepare_batch_tensors
        processor._generation_step = generation_step
        processor.model_runner._sample = self._sample
        processor.scheduler.clear_cancelled_requests = clear_cancelled_requests
        cache.search_prefix_match = search_prefix_match
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._salting(allocator.mark_complete_blocks)

    def _salting(self, mark: Callable[[str, list[int], int], None]) -> Callable[[str, list[int], int], None]:
        def mark_complete_blocks(request_id: str, token_ids: list[int], num_blocks: int) -> None:
            mark(request_id, self._salted(request_id, token_ids), num_blocks)

        return mark_complete_blocks

    def _salted(self, request_id: str, token_ids: list[int]) -> list[int]:
        completion = self.completions.get(request_id)
        if completion is None or completion.running.touch is None:
            return token_ids
        return SaltedIds(token_ids, completion.running)

    def _prepare(self, batch: Sequence[FutureRequestState]) -> None:
        row_of = self._row_of
        columns = np.array([(row_of[item.state.request_id], item.state.position_offset, item.query_length)
                            for item in batch], dtype=np.int64)
        rows, offsets, lengths = columns.T
        self._sampling = [self.completions[item.state.request_id].running for item in batch if item.has_new_token]
        with self._lock:
            table = self._table
            table[rows, 2] = np.maximum(table[rows, 2], offsets + lengths)
            if not self._num_steered or not table[rows, 0].any():
                self._plan = {}
                return
            slots = np.repeat(table[rows, 0], lengths)
            first = np.cumsum(lengths) - lengths
            index = np.repeat(table[rows, 1] + offsets - first, lengths) + np.arange(len(slots))
            index[slots == 0] = 0
            bits = self._arena.on[index] & ~self._arena.off[index]
        self._plan = self.steerer.plan(slots.astype(np.int32), bits)

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        count = len(self._sampling)
        if count == 0:
            return
        tokens = sample(scores[0, :count], self._sampling)
        output_ids[0, :count].copy_(tokens)
        for running, token in zip(self._sampling, tokens.tolist(), strict=True):
            self._note(running, token)

    def _note(self, running: Running, token: int) -> None:
        position = len(running.token_ids)
        running.token_ids.append(token)
        program, touch = running.program, running.touch
        if program is None or touch is None or not program.rules or position >= len(touch.on):
            return
        with self._lock:
            self._arena.on[running.base + position] |= np.uint32(program.rules.on.get(token, 0))
            self._arena.off[running.base + position] |= np.uint32(program.rules.off.get(token, 0))
