"""Steps of vLLM that are of requests alone, and steps that are of guests alone (`server.engines.guests`).

A guest is told by its priority. Where the cache is nearly full nothing is kept apart, because then vLLM has to take
blocks from somebody, and takes them from the lowest priority that it sees.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from server.engines.guests import STEP_S, Share
from server.engines.vllm.wire import GUEST

_STATE = "_trimtab_guests"
FULL = 0.9


class _State:
    """Of one scheduler. began: when each step of guests that is under way was begun, and its tokens."""

    def __init__(self) -> None:
        self.hosts = False
        self.share = Share(lambda: self.hosts)
        self.began: dict[int, tuple[float, int]] = {}
        self.last = 0.0


@contextmanager
def courtesy(scheduler: Any) -> Iterator[Callable[[Any], None]]:
    """Inside, the scheduler sees either requests or guests. What is yielded is to be told what it has planned."""
    guests = [request for request in (*scheduler.running, *scheduler.waiting) if request.priority >= GUEST]
    if not guests or scheduler.kv_cache_manager.usage > FULL:
        yield lambda planned: None
        return
    state: _State = scheduler.__dict__.setdefault(_STATE, _State())
    running, waiting = list(scheduler.running), list(scheduler.waiting)
    # What waits for something else, its grammar say, has no use for a step.
    state.hosts = any(request.priority < GUEST for request in running) or any(
        request.priority < GUEST and request.status.name in ("WAITING", "PREEMPTED") for request in waiting)
    theirs = state.share.due()

    def plan(planned: Any) -> None:
        if theirs and planned.total_num_scheduled_tokens:
            state.began[id(planned)] = state.share.clock(), planned.total_num_scheduled_tokens
        elif theirs:
            # Nothing of theirs finds room: the next steps are not kept free for it.
            state.share.took(STEP_S, 0)

    def stays(request: Any) -> bool:
        return bool((request.priority >= GUEST) == theirs) or not state.hosts

    hidden = [request for request in running if not stays(request)]
    held = [request for request in waiting if not stays(request)]
    most, places = scheduler.max_num_scheduled_tokens, scheduler.max_num_running_reqs
    if theirs:
        scheduler.max_num_scheduled_tokens = min(most, state.share.tokens)
    if hidden:
        scheduler.running = [request for request in running if stays(request)]
        # Workers keep a place for each of them.
        scheduler.max_num_running_reqs = places - len(hidden)
    if held:
        scheduler.waiting.remove_requests(held)
    try:
        yield plan
    finally:
        scheduler.max_num_scheduled_tokens, scheduler.max_num_running_reqs = most, places
        if hidden:
            scheduler.running = [*hidden, *scheduler.running]
        for request in held:
            scheduler.waiting.add_request(request)


def stepped(scheduler: Any, planned: Any) -> None:
    """A step is over."""
    state: _State | None = scheduler.__dict__.get(_STATE)
    if state is None:
        return
    now = state.share.clock()
    step = state.began.pop(id(planned), None)
    if step is not None:
        # Planned while the step before was under way, it began when that was over.
        began, tokens = step
        state.share.took(now - max(began, state.last), tokens)
    state.last = now
