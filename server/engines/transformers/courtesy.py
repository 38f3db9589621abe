"""Steps of the batching loop that are of requests alone, and steps that are of guests alone.

One batch of both would be as slow as the guests are many. So where both are there a step belongs to either, as
`server.engines.guests` shares out the time.
"""

from collections import deque
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

from server.engines.guests import Share

# What `Scheduler.schedule_batch` returns: the batch (None: the cache is full), and how to run it.
Scheduled = tuple[Any, ...]
Schedule = Callable[[int, int], Scheduled]


class Courtesy:
    """Of one batch processor; used by the engine's thread.

    Args:
        is_guest: whether the request of this name is one.
    """

    def __init__(self, scheduler: Any, is_guest: Callable[[str], bool], share: Share) -> None:
        self._scheduler, self._is_guest, self._share = scheduler, is_guest, share
        # Since when a step of guests has been under way, and its tokens.
        self._step: tuple[float, int] | None = None

    def schedule(self, schedule: Schedule, token_budget: int, cache_budget: int) -> Scheduled:
        """The next batch."""
        self._step = None
        names = self._scheduler.active_requests.keys() | self._scheduler.waiting_requests.keys()
        guests = {name for name in names if self._is_guest(name)}
        hosts = names - guests
        if not guests:
            return schedule(token_budget, cache_budget)
        if hosts and not self._share.due():
            with only(self._scheduler, hosts):
                found = schedule(token_budget, cache_budget)
            if found[0]:
                return found
            # Requests find no room as things are; guests that end make some.
        with only(self._scheduler, guests):
            found = schedule(min(token_budget, self._share.tokens), cache_budget)
        if not found[0]:
            return schedule(token_budget, cache_budget) if hosts else found
        self._step = self._share.clock(), sum(item.query_length for item in found[0])
        return found

    def stepped(self) -> None:
        """A step is over."""
        if self._step is not None:
            began, tokens = self._step
            self._step = None
            self._share.took(self._share.clock() - began, tokens)


@contextmanager
def only(scheduler: Any, names: Set[str]) -> Iterator[None]:
    """Requests other than these are out of the scheduler's sight meanwhile."""
    active, waiting, order = scheduler.active_requests, scheduler.waiting_requests, scheduler.waiting_requests_order
    scheduler.active_requests = {name: state for name, state in active.items() if name in names}
    scheduler.waiting_requests = {name: state for name, state in waiting.items() if name in names}
    scheduler.waiting_requests_order = deque(name for name in order if name in names)
    try:
        yield
    finally:
        left = scheduler.waiting_requests
        scheduler.active_requests = active | scheduler.active_requests
        scheduler.waiting_requests = {name: state for name, state in waiting.items() if name not in names
                                      or name in left}
        scheduler.waiting_requests_order = deque(name for name in order if name not in names or name in left)
