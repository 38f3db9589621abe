"""Companions: the weak runs of contrasts, which take part in every step that their request takes part in.

The stock scheduler knows the request alone. What it asks of the cache for a request with a companion is answered for
both. A step gets the companion in front of its request, with the same tokens at the same positions, so both have
logits in the same moment, and both have drawn the same tokens. Whatever becomes of the request, that it is thrown out
and computed again, cancelled or finished, becomes of its companion.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus

from server.engines.transformers.courtesy import Schedule, Scheduled
from server.engines.transformers.roster import Roster
from server.engines.transformers.running import COMPANION


def is_companion(request_id: str) -> bool:
    return request_id.endswith(COMPANION)


class Companions:
    """Of one batch processor; used by the engine's thread."""

    def __init__(self, processor: Any, roster: Roster) -> None:
        self._scheduler, self._cache, self._roster = processor.scheduler, processor.cache, roster
        for allocator in processor.cache.cache_allocators.values():
            allocator.needs_new_blocks = partial(self._needed, allocator.needs_new_blocks)
            allocator.allocate_cache_to_request = partial(self._allocate, allocator.allocate_cache_to_request)
            allocator.free_blocks = partial(self._free, allocator.free_blocks)

    def schedule(self, schedule: Schedule, token_budget: int, cache_budget: int) -> Scheduled:
        """The next batch, which leaves room for the companions that will join it.

        As much is left as they may take, and half at most: where they would take more, those of a batch take as much
        as the batch does.
        """
        with self._roster.lock:
            names = [name.removesuffix(COMPANION) for name in self._roster.companions]
        tables = (self._scheduler.active_requests, self._scheduler.waiting_requests)
        states: list[RequestState] = [table[name] for name in names for table in tables if name in table]
        tokens = sum(1 if state.status == RequestStatus.DECODING else len(state.remaining_prefill_tokens)
                     for state in states)
        read = sum(len(state.initial_tokens) + len(state.generated_tokens) for state in states)
        return schedule(token_budget - min(tokens, token_budget - token_budget // 2),
                        cache_budget - min(read, cache_budget - cache_budget // 2))

    def joined(self, batch: Sequence[FutureRequestState]) -> tuple[list[FutureRequestState], int, int]:
        """The batch with the companions of its requests, each in front of its own; how many tokens they have in it, and
        how many they read from the cache."""
        found: list[FutureRequestState] = []
        tokens = read = 0
        for item in batch:
            name = item.state.request_id + COMPANION
            if name in self._roster.companions:
                found.append(FutureRequestState(_companion(item.state, name), item.has_new_token,
                                                dict(item.complete_blocks), item.query_length))
                tokens += item.query_length
                read += item.state.current_len()
            found.append(item)
        return found, tokens, read

    def match(self, request_id: str, token_ids: list[int], search: Callable[[str, list[int]], int]) -> int:
        """How many of the tokens both find in the cache, as they begin at the same one. search: finds and takes the
        pages of one of them."""
        name = request_id + COMPANION
        if name not in self._roster.companions:
            return search(request_id, token_ids)
        most = search(name, token_ids)
        # The last token of those given is never looked for.
        found = search(request_id, token_ids[:most + 1])
        if found < most:
            self._cache.free_blocks(name)
            search(name, token_ids[:found + 1])
        return found

    def _needed(self, stock: Callable[..., int], request_id: str, past_length: int, query_length: int) -> int:
        return sum(stock(name, past_length, query_length) for name in self._both(request_id))

    def _allocate(self, stock: Callable[..., None], request_id: str, past_length: int, query_length: int) -> None:
        for name in self._both(request_id):
            stock(name, past_length, query_length)

    def _free(self, stock: Callable[..., None], request_id: str, no_cache: bool = False) -> None:
        stock(request_id, no_cache)
        # It may be known no more, but its pages are.
        stock(request_id + COMPANION, no_cache)

    def _both(self, request_id: str) -> tuple[str, ...]:
        name = request_id + COMPANION
        return (request_id, name) if name in self._roster.companions else (request_id,)


def _companion(state: RequestState, name: str) -> RequestState:
    """What the stock loop takes for another request in the same state. Nobody is told of its tokens."""
    made = copy.copy(state)
    made.request_id, made.streaming = name, False
    made.tokens_to_process, made.generated_tokens = list(state.tokens_to_process), list(state.generated_tokens)
    return made
