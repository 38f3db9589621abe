"""Whose fault a step is that raises. Each of its requests is tried alone; only who raises again, alone, is failed.

The stock loop ends with the first exception, and every request with it. Here a step that raised is undone: its requests
go back among those that wait, with the tokens they have, and are computed again one by one, up to where the step was.
Whoever passes goes on with the others, to the same text. That holds for a step of one request as well, which has one
second try in its life.
"""

import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from server.engines.transformers.companions import is_companion
from server.engines.transformers.courtesy import Schedule, Scheduled, only

log = structlog.get_logger(__name__)
# Steps that may raise without one between them that does not. More is no matter of single requests.
MOST_IN_A_ROW = 8
# How often a request that passes alone may be in a step that raises.
MOST_TRIALS = 3
TRACE_CHARACTERS = 4000


@dataclass(frozen=True)
class _Suspect:
    """Tried alone until `upto` of its tokens are in the cache."""

    request_id: str
    upto: int


class Suspects:
    """Of one batch processor; used by the engine's thread."""

    def __init__(self, processor: Any, fail: Callable[[str, Exception], None],
                 rewind: Callable[[str, list[int]], None]) -> None:
        """
        Args:
            fail: ends a request with what it raised.
            rewind: takes a request back to these tokens.
        """
        self._scheduler, self._ios = processor.scheduler, processor.inputs_and_outputs
        self._fail, self._rewind = fail, rewind
        self._queue: deque[_Suspect] = deque()
        self._trials: dict[str, int] = {}
        self._in_a_row = 0

    def caught(self, error: Exception) -> bool:
        """A step raised. True: it is dealt with, and the loop goes on; False: it is the engine's own fault."""
        # A companion goes where its request goes.
        batch = [item for item in self._ios.requests_in_batch if not is_companion(item.state.request_id)]
        self._in_a_row += 1
        if not batch or self._in_a_row > MOST_IN_A_ROW:
            return False
        log.warning("engine_step_raised", requests=len(batch),
                    trace="".join(traceback.format_exception(error))[-TRACE_CHARACTERS:])
        for item in batch:
            state: RequestState = item.state
            if self._queue and self._queue[0].request_id == state.request_id:
                self._queue.popleft()
            upto = state.position_offset
            self._scheduler.finish_request(state.request_id)
            trials = self._trials.get(state.request_id, 0) + 1
            # Alone for the first time it may be innocent, too: it has one more try, as members of a group have.
            if trials > (1 if len(batch) == 1 else MOST_TRIALS):
                self._trials.pop(state.request_id, None)
                self._fail(state.request_id, error)
                continue
            again = state.create_equivalent_initial_request()
            state.status = RequestStatus.FINISHED
            self._scheduler.add_waiting_request(again)
            self._rewind(again.request_id, again.initial_tokens)
            self._trials[again.request_id] = trials
            self._queue.append(_Suspect(again.request_id, upto))
        self._scheduler.block_new_requests = False
        # Nothing is left of the step to be updated.
        self._ios.requests_in_batch, self._ios.num_request_in_batch = [], 0
        return True

    def passed(self) -> None:
        """A step did not raise."""
        self._in_a_row = 0
        if self._queue:
            state = self._scheduler.active_requests.get(self._queue[0].request_id)
            if state is None or state.position_offset >= self._queue[0].upto:
                self._queue.popleft()
        elif self._trials:
            self._trials = {name: n for name, n in self._trials.items() if name in self._scheduler.active_requests
                            or name in self._scheduler.waiting_requests}

    def schedule(self, schedule: Schedule, token_budget: int, cache_budget: int) -> Scheduled:
        """The next batch: the next suspect alone, as long as there are some."""
        while self._queue:
            found = self._alone(self._queue[0].request_id, schedule, token_budget, cache_budget)
            if found is not None:
                return found
            # It is gone, or finds no room as things are: then it goes with the others.
            self._queue.popleft()
        return schedule(token_budget, cache_budget)

    def _alone(self, name: str, schedule: Schedule, token_budget: int, cache_budget: int
               ) -> Scheduled | None:
        tables = self._scheduler
        if name not in tables.active_requests and name not in tables.waiting_requests:
            return None
        blocked, tables.block_new_requests = tables.block_new_requests, False
        try:
            with only(tables, {name}):
                found = schedule(token_budget, cache_budget)
        finally:
            tables.block_new_requests = blocked
        return found if found[0] else None
