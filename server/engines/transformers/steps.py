"""What Trimtab adds to each step of transformers' continuous batching.

The stock engine is not forked: bound methods of one batch processor are wrapped when it is made (`bind`), and
`stock.py` holds what is expected of them.
  clear_cancelled_requests  begins each round -> who left is gone from every table, whatever state it was in
  schedule_batch  chooses who takes part -> what was held back for one that left is let go; requests and guests take
      turns (`courtesy.py`); after a step that raised, one at a time (`suspects.py`)
  prepare_batch_tensors  knows which tokens of which requests come next -> the steering plan of the batch
  _generation_step  runs the forward pass -> the plan is carried out around it, and what was not finite is told
  _sample  has the logits -> tokens per request's own settings and seed
  search_prefix_match, mark_complete_blocks  hash token ids for prefix sharing -> ids salted by what a program did, and
      nothing of a request that has been given up
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState

from server.engines.arena import Arena
from server.engines.base import Touched
from server.engines.guests import Share
from server.engines.keeping import KeptRows
from server.engines.measured import Indices, MeasuredTable
from server.engines.transformers.courtesy import Courtesy
from server.engines.transformers.finite import Examined, Watch, examining
from server.engines.transformers.handover import on_loop
from server.engines.transformers.head import Head
from server.engines.transformers.running import EngineCompletion, Failure, Overflow, Running, SaltedIds
from server.engines.transformers.sampler import NO_TOKEN, choices, sample
from server.engines.transformers.suspects import Suspects
from steering.acting.containment import Fault, StepLimit
from steering.acting.record import Record
from steering.acting.steerer import Steerer
from steering.language.errors import EngineFailed, InvalidRequest, TrimtabError
from steering.residency.bank import Bank
from steering.residency.plan import StepPlan


@dataclass(frozen=True)
class Batch:
    """Requests of a step in the order of its flat batch: their rows in the table, tokens before and tokens in it.

    known: tokens that had been run already, more than come before it where a request is computed again.
    """

    request_ids: list[str]
    rows: Indices
    offsets: Indices
    lengths: Indices
    known: Indices

    @cached_property
    def owners(self) -> Indices:
        """Index of the request that each token of the flat batch belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def positions(self) -> Indices:
        """Position of each token of the flat batch in its request."""
        shift = self.offsets - (np.cumsum(self.lengths) - self.lengths)
        return np.arange(len(self.owners)) + shift[self.owners]

    def place(self, token: int) -> tuple[int, int]:
        """Request and position in it of a token of the flat batch."""
        return int(self.owners[token]), int(self.positions[token])


NOBODY = Batch([], *(np.zeros(0, dtype=np.int64),) * 4)


class Steps:
    """Running completions and the steps they take part in. `on_retired` is called from the engine's thread.

    A completion is known here from its admission (`add`) until the engine has let go of it (`retire`). In between it
    may be asked to leave (`leave`, from the event loop; `fail`, from the engine's thread): the engine's thread drops
    it before its next step, and until then its rows stay its own.

    done: steps that were carried out, counted on. share: of the guests among the completions.
    """

    def __init__(self, steerer: Steerer, bank: Bank, watch: Watch, head: Head, limit: StepLimit,
                 on_retired: Callable[[Running], None]) -> None:
        self.steerer = steerer
        self.bank = bank
        self.watch = watch
        self.head = head
        self.limit = limit
        self.completions: dict[str, EngineCompletion] = {}
        self._on_retired = on_retired
        self._hosts = 0
        self.share = Share(lambda: self._hosts > 0)
        self.done = 0
        self._lock = threading.Lock()
        # Completions that nobody reads any more; of those, the ones that were told of a failure.
        self._leaving: set[str] = set()
        self._given_up: set[str] = set()
        self._arena = Arena()
        # One row per running completion: slot, where its bits begin, tokens processed.
        self._row_of: dict[str, int] = {}
        self._table = np.zeros((64, 3), dtype=np.int64)
        self._measured = MeasuredTable(64)
        self._free_rows = list(range(63, -1, -1))
        self._num_steered = 0
        self._keeping: dict[str, KeptRows] = {}
        # Of the step at hand: its plan, its batch, who gets a token, and whether the pass was finite.
        self._plan: StepPlan = {}
        self._batch = NOBODY
        self._sampling: list[Running] = []
        self._examined: Examined | None = None
        self._broken = False
        self._voiceless: list[str] = []
        self._unplanned: Exception | None = None
        self._under_way = False

    # Admission and end, called with the request's slot already pinned.

    def add(self, completion: EngineCompletion) -> None:
        """Raises InvalidRequest if there is one of that name."""
        running = completion.running
        with self._lock:
            if running.request_id in self.completions:
                raise InvalidRequest(f"request id {running.request_id} is in use", param="request_id")
            if running.touch is not None:
                running.base = self._arena.put(running.touch.on, running.touch.off)
                self._num_steered += 1
            if not self._free_rows:
                size = len(self._table)
                self._table = np.concatenate([self._table, np.zeros_like(self._table)])
                self._measured.grow()
                self._free_rows = list(range(2 * size - 1, size - 1, -1))
            row = self._free_rows.pop()
            self._table[row] = (running.slot, running.base, 0)
            self._measured.reset(row)
            self._row_of[running.request_id] = row
            if (kept := completion.kept()) is not None:
                self._keeping[running.request_id] = kept
            self.completions[running.request_id] = completion
            self._hosts += not running.generation.guest

    def open(self, request_id: str) -> EngineCompletion | None:
        """The completion, if somebody still reads it."""
        with self._lock:
            return None if request_id in self._leaving else self.completions.get(request_id)

    def leave(self, running: Running) -> bool:
        """Have a completion dropped before the next step. False if it is not known here."""
        with self._lock:
            found = self.completions.get(running.request_id)
            if found is None or found.running is not running:
                return False
            self._leaving.add(running.request_id)
            return True

    def fail(self, request_id: str, failure: Failure) -> None:
        """End one completion of the step that is under way; called from the engine's thread. Its reader gets `failure`,
        the step's token is dropped, none of its pages are shared."""
        completion = self.open(request_id)
        if completion is not None and self.leave(completion.running):
            self._given_up.add(request_id)
            with self._lock:
                completion.running.measured = self._measured.of(self._row_of[request_id])
            on_loop(completion.loop, completion.fail, failure)

    def retire(self, request_id: str) -> None:
        """Forget a completion and free what it holds. Does nothing for one that is gone already."""
        with self._lock:
            completion = self.completions.pop(request_id, None)
            self._leaving.discard(request_id)
            self._given_up.discard(request_id)
            if completion is None:
                return
            self._keeping.pop(request_id, None)
            running = completion.running
            self._hosts -= not running.generation.guest
            row = self._row_of.pop(request_id)
            running.processed = int(self._table[row, 2])
            running.measured = self._measured.of(row)
            self._free_rows.append(row)
            if running.touch is not None:
                self._arena.drop(running.base, len(running.touch.on))
                self._num_steered -= 1
        self._on_retired(running)

    def touched(self, running: Running) -> list[Touched]:
        """What its interventions acted on among the tokens that went through the model, and how far they moved them."""
        with self._lock:
            row = self._row_of.get(running.request_id)
            if row is None:
                return running.touched(running.processed, running.measured)
            processed, measured = int(self._table[row, 2]), self._measured.of(row)
        return running.touched(processed, measured)

    def in_step(self) -> frozenset[str]:
        """Who takes part in the step that is under way; in that of a loop that ended, if it ended in one."""
        return frozenset(self._batch.request_ids) if self._under_way else frozenset()

    def _is_guest(self, request_id: str) -> bool:
        completion = self.completions.get(request_id)
        return completion is not None and completion.running.generation.guest

    # The steps, called from the engine's thread.

    def bind(self, processor: Any) -> None:
        """Wrap the methods of a fresh batch processor."""
        ios, cache, scheduler = processor.inputs_and_outputs, processor.cache, processor.scheduler
        prepare, step, search = ios.prepare_batch_tensors, processor._generation_step, cache.search_prefix_match
        clear, schedule = scheduler.clear_cancelled_requests, scheduler.schedule_batch
        suspects = Suspects(processor, self._raised, self._rewind)
        courtesy = Courtesy(scheduler, self._is_guest, self.share)

        def prepare_batch_tensors(requests_in_batch: list[FutureRequestState], *args: Any, **kwargs: Any) -> None:
            self._under_way, self._unplanned = True, None
            try:
                self._prepare(requests_in_batch)
            except Exception as error:  # raised where the step is, and its requests can be told apart
                self._unplanned = error
            prepare(requests_in_batch, *args, **kwargs)

        def generation_step(model: Any) -> None:
            try:
                if self._unplanned is not None:
                    raise self._unplanned
                carry_out(model)
            except Exception as error:
                self.watch.forget()
                self.head.forget()
                if not suspects.caught(error):
                    raise
            else:
                suspects.passed()
            self.done += 1
            courtesy.stepped()

        def carry_out(model: Any) -> None:
            self._examined, self._broken, self._voiceless = None, False, []
            self.head.listening = bool(self._keeping)
            with self.steerer.acting(self._plan, self.limit) as record:
                step(model)
            if self._broken:
                # The same step once more: it writes the same pages, this time without what is not finite.
                with examining(cache) as self._examined, self.steerer.acting(self._plan, self.limit) as record:
                    step(model)
            self._settle(record)
            self._keep()
            self.watch.forget()
            self.head.forget()

        def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
            kept = self._keeping.get(request_id)
            # What is to be kept has to be computed, so no more of an untouched text is read from the cache. The rows of
            # a steered one begin at the last token of its prompt, which is never read.
            given = prompt_ids if kept is None else prompt_ids[:kept.stop + 1]
            matched: int = search(request_id, self._salted(request_id, given))
            return matched

        def clear_cancelled_requests() -> Any:
            self._under_way = False
            # The stock queue of cancellations may be read before the request it is for has come; this set is kept until
            # the request is found.
            with self._lock, scheduler._cancellation_lock:
                scheduler._requests_to_cancel |= self._leaving
            cancelled = clear()
            for state in cancelled:
                self.retire(state.request_id)
            if cancelled:
                scheduler.block_new_requests = False
            return cancelled

        def schedule_batch(token_budget: int, cache_budget: int) -> Any:
            # After one was offloaded, new requests wait until an active one is over. Where none is active nobody would
            # ever let them in.
            if not scheduler.active_requests:
                scheduler.block_new_requests = False
            return suspects.schedule(partial(courtesy.schedule, schedule), token_budget, cache_budget)

        ios.prepare_batch_tensors = prepare_batch_tensors
        processor._generation_step = generation_step
        processor.model_runner._sample = self._sample
        scheduler.clear_cancelled_requests = clear_cancelled_requests
        scheduler.schedule_batch = schedule_batch
        cache.search_prefix_match = search_prefix_match
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._salting(allocator.mark_complete_blocks)

    def _salting(self, mark: Callable[[str, list[int], int], None]) -> Callable[[str, list[int], int], None]:
        def mark_complete_blocks(request_id: str, token_ids: list[int], num_blocks: int) -> None:
            # Without a salt the pages of one that is gone would be everybody's.
            if num_blocks and request_id in self.completions and request_id not in self._given_up:
                mark(request_id, self._salted(request_id, token_ids), num_blocks)

        return mark_complete_blocks

    def _salted(self, request_id: str, token_ids: list[int]) -> list[int]:
        completion = self.completions.get(request_id)
        if completion is None or completion.running.touch is None:
            return token_ids
        return SaltedIds(token_ids, completion.running)

    def _raised(self, request_id: str, error: Exception) -> None:
        """Alone in a step that raised."""
        self.fail(request_id, error if isinstance(error, TrimtabError) else EngineFailed(
            f"the engine failed on this request ({type(error).__name__})"))
        self.retire(request_id)

    def _rewind(self, request_id: str, token_ids: list[int]) -> None:
        """Undo for one completion what the step at hand noted."""
        running = self.completions[request_id].running
        known = len(token_ids)
        running.rewind(token_ids)
        with self._lock:
            if request_id in self._batch.request_ids:
                place = self._batch.request_ids.index(request_id)
                self._table[self._batch.rows[place], 2] = self._batch.known[place]
            if running.touch is not None:
                rest = slice(running.base + known, running.base + len(running.touch.on))
                self._arena.on[rest], self._arena.off[rest] = running.touch.on[known:], running.touch.off[known:]

    def _prepare(self, batch: Sequence[FutureRequestState]) -> None:
        self._batch = NOBODY
        row_of = self._row_of
        columns = np.array([(row_of[item.state.request_id], item.state.position_offset, item.query_length)
                            for item in batch], dtype=np.int64)
        rows, offsets, lengths = columns.T
        self._sampling = [self.completions[item.state.request_id].running for item in batch if item.has_new_token]
        with self._lock:
            table = self._table
            self._batch = Batch([item.state.request_id for item in batch], rows, offsets, lengths, table[rows, 2])
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
        logits = scores[0, :count]
        drawn = sample(logits, self._sampling)
        if self._examined is None:
            # One transfer: whether the whole pass was finite goes with the tokens.
            *tokens, whole = torch.cat([drawn, self.watch.total().isfinite().long().unsqueeze(0)]).tolist()
            self._broken = not whole or NO_TOKEN in tokens
            if self._broken:
                return
        else:
            tokens = drawn.tolist()
        output_ids[0, :count].copy_(drawn.clamp_min(0))
        told = choices(logits, [max(token, 0) for token in tokens], self._sampling)
        for running, token, choice in zip(self._sampling, tokens, told, strict=True):
            if token == NO_TOKEN:
                self._voiceless.append(running.request_id)
            running.choices.append(choice)
            self._note(running, max(token, 0))

    def _note(self, running: Running, token: int) -> None:
        position = len(running.token_ids)
        running.token_ids.append(token)
        touch = running.touch
        if touch is None or not touch.rules or position >= len(touch.on):
            return
        gets, loses = touch.rules.of(token)
        with self._lock:
            self._arena.on[running.base + position] |= np.uint32(gets)
            self._arena.off[running.base + position] |= np.uint32(loses)

    def _keep(self) -> None:
        """Copy the rows of the requests that are to be compared."""
        chosen: list[tuple[KeptRows, int]] = []
        index: list[Indices] = []
        for i, request_id in enumerate(self._batch.request_ids) if self._keeping and self.head.listening else ():
            kept = self._keeping.get(request_id)
            if kept is None or kept.lost is not None:
                continue
            offset, length = int(self._batch.offsets[i]), int(self._batch.lengths[i])
            known = max(kept.stop - offset, 0)
            if known < length:
                end = int(self._batch.lengths[:i + 1].sum())
                chosen.append((kept, offset + known))
                index.append(np.arange(end - length + known, end))
        if not chosen:
            return
        rows = torch.from_numpy(np.concatenate(index)).to(self.bank.device)
        hidden, residual = self.head.rows(rows), self.watch.rows(rows)
        sizes = [len(part) for part in index]
        for (kept, position), ours, streams in zip(chosen, hidden.split(sizes), residual.split(sizes), strict=True):
            # Copies, as a view would hold the rows of all others.
            kept.add(position, ours.clone(), streams.clone())

    def _settle(self, record: Record) -> None:
        """Sum up the steps of a pass and give up the requests that are at fault for what it could not carry out."""
        faults: dict[int, Fault | Overflow] = {}
        batch, taken = self._batch, record.read()
        if taken is not None:
            owners = batch.owners[taken.positions]
            new = batch.positions[taken.positions] >= batch.known[owners]
            with self._lock:
                self._measured.add(batch.rows[owners[new]], taken.interventions[new], taken.values[new], self.limit)
            for entry in taken.faults(self.limit).tolist():
                site, layer = record.stages[taken.stages[entry]].key or (None, None)
                owner, position = batch.place(int(taken.positions[entry]))
                faults.setdefault(owner, Fault(int(taken.interventions[entry]), site, layer, position,
                                               float(taken.values[entry])))
        if self._examined is not None:
            self._blame(self._examined, faults)
        for owner, fault in faults.items():
            self.fail(batch.request_ids[owner], fault)

    def _blame(self, examined: Examined, faults: dict[int, Fault | Overflow]) -> None:
        """Add the requests whose values stopped being finite in the layers."""
        for token, layer in sorted(examined.tokens.items(), key=lambda item: (item[1], item[0])):
            owner, position = self._batch.place(token)
            faults.setdefault(owner, Overflow(position, layer))
        for owner, (layer, position) in examined.cached.items():
            faults.setdefault(owner, Overflow(position, layer))
        for token in self.watch.broken().nonzero().flatten().tolist():
            owner, position = self._batch.place(token)
            faults.setdefault(owner, Overflow(position, self.watch.last_layer))
        for request_id in self._voiceless:
            owner = self._batch.request_ids.index(request_id)
            last = int(self._batch.offsets[owner] + self._batch.lengths[owner]) - 1
            faults.setdefault(owner, Overflow(last, None))
