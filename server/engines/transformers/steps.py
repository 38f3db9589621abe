"""What Trimtab adds to each step of transformers' continuous batching.

The stock engine is not forked: bound methods of one batch processor are wrapped when it is made (`bind`), and
`stock.py` holds what is expected of them.
  clear_cancelled_requests  begins each round -> who left is gone from every table, whatever state it was in
  schedule_batch  chooses who takes part -> what was held back for one that left is let go; requests and guests take
      turns (`courtesy.py`); after a step that raised, one at a time (`suspects.py`)
  prepare_batch_tensors  knows which tokens of which requests come next -> the companions of contrasts join them
      (`companions.py`), and the steering plan of the batch is made
  _generation_step  runs the forward pass -> the plan is carried out around it, and what was not finite is told
  _sample  has the logits -> tokens per request's own settings and seed
  search_prefix_match, mark_complete_blocks  hash token ids for prefix sharing -> ids salted by what a program did,
      nothing of a request that has been given up, and also what the last step of a request has filled
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from server.engines.keeping import KeptRows
from server.engines.measured import Indices
from server.engines.transformers.attention import attend_apart
from server.engines.transformers.companions import Companions, is_companion
from server.engines.transformers.constraints import follow, held
from server.engines.transformers.contrast import contrasted
from server.engines.transformers.courtesy import Courtesy
from server.engines.transformers.finite import Examined, Watch, examining
from server.engines.transformers.head import Head
from server.engines.transformers.roster import NOBODY, Roster
from server.engines.transformers.running import COMPANION, OfWeak, Overflow, Running, SaltedIds
from server.engines.transformers.sampler import NO_TOKEN, NONE_LEFT, reports, sample
from server.engines.transformers.suspects import Suspects
from steering.acting.containment import Fault, StepLimit
from steering.acting.record import Record
from steering.acting.steerer import Steerer
from steering.language.errors import EngineFailed, InvalidRequest, TrimtabError
from steering.residency.plan import StepPlan


class Steps:
    """The steps that the completions of the roster take part in. done: steps that were carried out, counted on."""

    def __init__(self, roster: Roster, steerer: Steerer, watch: Watch, head: Head, limit: StepLimit) -> None:
        self.roster = roster
        self.steerer = steerer
        self.watch = watch
        self.head = head
        self.limit = limit
        self.done = 0
        # Of the step at hand: its plan, its batch, who gets a token, and whether the pass was finite.
        self._plan: StepPlan = {}
        self._batch = NOBODY
        self._sampling: list[Running] = []
        # Rows of the logits: of those who get a token, and of the companions among them.
        self._rows: list[int] = []
        self._weak_rows: list[int] = []
        self._examined: Examined | None = None
        self._broken = False
        self._voiceless: list[str] = []
        self._unplanned: Exception | None = None
        self._under_way = False

    def in_step(self) -> frozenset[str]:
        """Who takes part in the step that is under way; in that of a loop that ended, if it ended in one."""
        return frozenset(self._batch.request_ids) if self._under_way else frozenset()

    # The steps, called from the engine's thread.

    def bind(self, processor: Any) -> None:
        """Wrap the methods of a fresh batch processor."""
        ios, cache, scheduler = processor.inputs_and_outputs, processor.cache, processor.scheduler
        prepare, step, search = ios.prepare_batch_tensors, processor._generation_step, cache.search_prefix_match
        clear, schedule = scheduler.clear_cancelled_requests, scheduler.schedule_batch
        companions = Companions(processor, self.roster)
        suspects = Suspects(processor, self._raised, self._rewind)
        courtesy = Courtesy(scheduler, self.roster.is_guest, self.roster.share)
        attend_apart(cache)

        def prepare_batch_tensors(*, requests_in_batch: list[FutureRequestState], num_q_tokens: int, max_kv_read: int,
                                  **kwargs: Any) -> None:
            self._under_way, self._unplanned = True, None
            batch, tokens, read = companions.joined(requests_in_batch)
            try:
                self._prepare(batch)
            except Exception as error:  # raised where the step is, and its requests can be told apart
                self._unplanned = error
            prepare(requests_in_batch=batch, num_q_tokens=num_q_tokens + tokens, max_kv_read=max_kv_read + read,
                    **kwargs)

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
            self.head.listening = bool(self.roster.keeping)
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
            kept = self.roster.keeping.get(request_id)
            # What is to be kept has to be computed, so no more of an untouched text is read from the cache. The rows of
            # a steered one begin at the last token of its prompt, which is never read.
            given = prompt_ids if kept is None else prompt_ids[:kept.stop + 1]
            matched = companions.match(request_id, given, lambda name, ids: search(name, self._salted(name, ids)))
            completion = self.roster.completions.get(request_id)
            if completion is not None and completion.running.cached is None:
                completion.running.cached = min(matched, len(completion.running.generation.prompt_ids))
            return matched

        def clear_cancelled_requests() -> Any:
            self._under_way = False
            # The stock queue of cancellations may be read before the request it is for has come; this set is kept until
            # the request is found.
            with self.roster.lock, scheduler._cancellation_lock:
                scheduler._requests_to_cancel |= self.roster.leaving
            cancelled = clear()
            for state in cancelled:
                self.roster.retire(state.request_id)
            if cancelled:
                scheduler.block_new_requests = False
            return cancelled

        def schedule_batch(token_budget: int, cache_budget: int) -> Any:
            # After one was offloaded, new requests wait until an active one is over. Where none is active nobody would
            # ever let them in.
            if not scheduler.active_requests:
                scheduler.block_new_requests = False
            return suspects.schedule(partial(courtesy.schedule, partial(companions.schedule, schedule)), token_budget,
                                     cache_budget)

        ios.prepare_batch_tensors = prepare_batch_tensors
        processor._generation_step = generation_step
        processor.model_runner._sample = self._sample
        scheduler.clear_cancelled_requests = clear_cancelled_requests
        scheduler.schedule_batch = schedule_batch
        cache.search_prefix_match = search_prefix_match
        cache.mark_complete_blocks = partial(_mark_complete_blocks, cache)
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._salting(allocator.mark_complete_blocks)

    def _salting(self, mark: Callable[[str, list[int], int], None]) -> Callable[[str, list[int], int], None]:
        def mark_complete_blocks(request_id: str, token_ids: list[int], num_blocks: int) -> None:
            # Without a salt the pages of one that is gone would be everybody's.
            name = request_id.removesuffix(COMPANION)
            if num_blocks and name in self.roster.completions and name not in self.roster.given_up:
                mark(request_id, self._salted(request_id, token_ids), num_blocks)

        return mark_complete_blocks

    def _salted(self, request_id: str, token_ids: list[int]) -> list[int]:
        running = self.roster.running(request_id)
        if running is None or (running.touch is None and running.generation.cache_salt is None):
            return token_ids
        return SaltedIds(token_ids, running)

    def _raised(self, request_id: str, error: Exception) -> None:
        """Alone in a step that raised."""
        self.roster.fail(request_id, error if isinstance(error, TrimtabError) else EngineFailed(
            f"the engine failed on this request ({type(error).__name__})"))
        self.roster.retire(request_id)

    def _rewind(self, request_id: str, token_ids: list[int]) -> None:
        self.roster.rewind(self._batch, request_id, token_ids)

    def _prepare(self, states: Sequence[FutureRequestState]) -> None:
        self._batch, self._plan = NOBODY, {}
        told = [item.state.request_id for item in states if item.has_new_token]
        self._rows = [row for row, name in enumerate(told) if not is_companion(name)]
        self._weak_rows = [row for row, name in enumerate(told) if is_companion(name)]
        self._sampling = [self.roster.completions[told[row]].running for row in self._rows]
        self._batch = self.roster.batch_of(states)
        touched = self.roster.touch_of(self._batch)
        if touched is not None:
            self._plan = self.steerer.plan(*touched)

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        count = len(self._sampling)
        rows = scores[0, self._rows] if self._weak_rows else scores[0, :count]
        logits = contrasted(held(rows, self._sampling), scores[0, self._weak_rows], self._sampling)
        drawn = sample(logits, self._sampling)
        if self._examined is None:
            # One transfer: whether the whole pass was finite goes with the tokens.
            *tokens, whole = torch.cat([drawn, self.watch.total().isfinite().long().unsqueeze(0)]).tolist()
            self._broken = not whole or NO_TOKEN in tokens
            if self._broken:
                return
        else:
            tokens = drawn.tolist()
        given = drawn.clamp_min(0).to(output_ids.dtype)
        if self._weak_rows:
            output_ids[0, self._rows] = given
            pairs = [i for i, item in enumerate(self._sampling) if item.weak is not None]
            output_ids[0, self._weak_rows] = given[pairs]
        else:
            output_ids[0, :count].copy_(given)
        told = reports(logits, [max(token, 0) for token in tokens], self._sampling)
        for running, token, one in zip(self._sampling, tokens, told, strict=True):
            if token == NO_TOKEN:
                self._voiceless.append(running.request_id)
            if token == NONE_LEFT or (token >= 0 and not follow(running.matcher, [token])):
                self.roster.fail(running.request_id, InvalidRequest(
                    "nothing can follow what was generated: the grammar or the lists of the request rule every token "
                    "out", fix="Allow the end of the text, or give a grammar that this model's tokens can write."))
            running.drawn.append(one)
            for run in running.runs:
                self.roster.note(run, max(token, 0))

    def _keep(self) -> None:
        """Copy the rows of the requests that are to be compared."""
        chosen: list[tuple[KeptRows, int]] = []
        index: list[Indices] = []
        for i, request_id in enumerate(self._batch.request_ids) if self.roster.keeping and self.head.listening else ():
            kept = self.roster.keeping.get(request_id)
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
        rows = torch.from_numpy(np.concatenate(index)).to(self.steerer.table.device)
        hidden, residual = self.head.rows(rows), self.watch.rows(rows)
        sizes = [len(part) for part in index]
        for (kept, position), ours, streams in zip(chosen, hidden.split(sizes), residual.split(sizes), strict=True):
            kept.add(position, ours, streams)

    def _settle(self, record: Record) -> None:
        """Sum up the steps of a pass and give up the requests that are at fault for what it could not carry out."""
        faults: dict[int, Fault | Overflow] = {}
        batch, taken = self._batch, record.read()
        if taken is not None:
            self.roster.measure(batch, taken, self.limit)
            for entry in taken.faults(self.limit).tolist():
                site, layer = record.stages[taken.stages[entry]].key or (None, None)
                owner, position = batch.place(int(taken.positions[entry]))
                faults.setdefault(owner, Fault(int(taken.interventions[entry]), site, layer, position,
                                               float(taken.values[entry])))
        if self._examined is not None:
            self._blame(self._examined, faults)
        for owner, fault in faults.items():
            name = batch.request_ids[owner]
            self.roster.fail(name.removesuffix(COMPANION), OfWeak(fault) if is_companion(name) else fault)

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


def _mark_complete_blocks(cache: Any, state: RequestState, complete_blocks: dict[str, int]) -> None:
    """What the stock method does, also for a request that has drawn its last token. The stock one takes such a request
    for one whose pages are gone already, which they are not before `finish_request`: a request with one step, as passes
    over a text are, would leave nothing for the next one with the same beginning."""
    if cache.allow_block_sharing and complete_blocks:
        token_ids = state.initial_tokens + state.generated_tokens
        for name, count in complete_blocks.items():
            cache.cache_allocators[name].mark_complete_blocks(state.request_id, token_ids, count)
