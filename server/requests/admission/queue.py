"""The queue in front of the engine: bounded in requests and tokens, fair among clients.

A request waits from when its body is read (`entering`: its plan, its tokens, a place for its gates) until the last of
its completions has a place (`joined`). What is over a bound is refused at once, with a time after which another try
is likely to fare better. The engine never has more completions than it runs at once, so nothing waits where nobody is
fair.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

from server.errors import Overloaded
from server.observability import instruments
from server.requests.admission.fairness import LAST, SHARE, Client, FairQueue

Kind = Literal["requests", "tokens"]
# Of the tokens that a completion may generate no more than so many are counted, because few completions use them all.
EXPECTED_TOKENS = 512
# How many completions the speed is estimated from, and the bounds of Retry-After.
RECENT = 256
LEAST_WAIT_S, MOST_WAIT_S, UNKNOWN_WAIT_S = 1.0, 60.0, 5.0
SECONDS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True)
class Cost:
    """What one completion may cost. prompt: tokens of its prompt, 0 if another completion of the request reads it.
    most: tokens that it may generate."""

    prompt: int
    most: int

    @property
    def tokens(self) -> int:
        return self.prompt + min(self.most, EXPECTED_TOKENS)


class Ticket:
    """A place in the engine for one completion: `async with` waits for it and gives it back at the end."""

    def __init__(self, queue: "AdmissionQueue", request: "_Waiting", cost: Cost) -> None:
        self.cost = cost
        self.generated = 0
        self.granted = asyncio.Event()
        self._queue, self._request = queue, request
        self._over = False

    async def __aenter__(self) -> Self:
        await self.granted.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give the place up, or stop waiting for it. Idempotent."""
        if not self._over:
            self._over = True
            self._queue._left(self, self._request)


@dataclass(eq=False)
class _Waiting:
    """A request in the queue. left: places it waits for. requests: as how many it is counted while it does."""

    client: Client
    left: int
    since: float
    requests: int


class AdmissionQueue:
    """Used on the event loop only."""

    def __init__(self, registry: instruments.Registry, *, places: int, most_requests: int, most_tokens: int,
                 weight: Callable[[str, str], float] = lambda tenant, key: 1.0) -> None:
        """places: completions that run at once. most_requests, most_tokens: that wait. weight: of a tenant, with "" for
        the key, or of one of its keys."""
        self._fair: FairQueue[Ticket] = FairQueue(places, partial(_weight_of, weight))
        self.follow(most_requests, most_tokens)
        self._totals: Counter[Kind] = Counter()
        # Counted by tenant, key and host, because connections are cheap to open.
        self._own: dict[Kind, Counter[Client]] = {"requests": Counter(), "tokens": Counter()}
        self._finished: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._refused = instruments.Counter(
            "trimtab_overloaded", "Requests refused because too much waits, by what was too much (requests, tokens) "
            "and for whom (all, client).", ["of", "scope"], registry=registry)
        self._waited = instruments.Histogram("trimtab_queue_seconds", "Time a completion waited for its place.",
                                             buckets=SECONDS, registry=registry)
        for name, value in {"requests": lambda: self._totals["requests"], "tokens": lambda: self._totals["tokens"],
                            "completions": lambda: self._fair.waiting}.items():
            instruments.Gauge(f"trimtab_queue_{name}", f"{name.capitalize()} that wait in front of the engine.",
                              registry=registry).set_function(value)

    def follow(self, most_requests: int, most_tokens: int) -> None:
        """Bounds for what comes from now on; what waits already stays."""
        self._bounds: dict[Kind, int] = {"requests": most_requests, "tokens": most_tokens}

    @property
    def waiting(self) -> int:
        """Completions, and passes of requests, that wait for a place."""
        return self._fair.waiting

    @property
    def running(self) -> int:
        """Completions, and passes of requests, that have a place."""
        return self._fair.running

    @contextmanager
    def entering(self, client: Client) -> Iterator[None]:
        """A request whose completions are not known yet. Raises Overloaded."""
        self._take("requests", client, 1)
        try:
            yield
        finally:
            self._give("requests", client, 1)

    @contextmanager
    def joined(self, client: Client, costs: Sequence[Cost], *, entered: bool = False) -> Iterator[list[Ticket]]:
        """Places for the completions of one request, or for passes beside them; what is not used of them is given up at
        the end.

        Args:
            entered: whether the request is inside `entering`, and counted there.

        Raises:
            Overloaded: too much waits already.
        """
        tokens = sum(cost.tokens for cost in costs)
        requests = 0 if entered else 1
        self._take("requests", client, requests)
        try:
            self._take("tokens", client, tokens)
        except Overloaded:
            self._give("requests", client, requests)
            raise
        request = _Waiting(client, len(costs), time.monotonic(), requests)
        places = [Ticket(self, request, cost) for cost in costs]
        try:
            for place in places:
                self._fair.push(client, place, place.cost.tokens)
            self._grant()
            yield places
        finally:
            # Those that still wait leave first. Otherwise one of them would be given a place only to give it up.
            for place in reversed(places):
                place.leave()

    def _grant(self) -> None:
        while (found := self._fair.pop()) is not None:
            _, place = found
            self._waited.observe(time.monotonic() - place._request.since)
            self._served(place, place._request)
            place.granted.set()

    def _served(self, place: Ticket, request: _Waiting) -> None:
        """A place does not wait any more."""
        self._give("tokens", request.client, place.cost.tokens)
        request.left -= 1
        if request.left == 0:
            self._give("requests", request.client, request.requests)

    def _left(self, place: Ticket, request: _Waiting) -> None:
        if place.granted.is_set():
            self._fair.done(request.client, place.cost.tokens, place.cost.prompt + place.generated)
            self._finished.append((time.monotonic(), place.cost.prompt + place.generated))
            self._grant()
        else:
            self._fair.remove(request.client, place)
            self._served(place, request)

    def _take(self, kind: Kind, client: Client, amount: int) -> None:
        if not amount:
            return
        free = self._bounds[kind] - self._totals[kind] - amount
        own = self._own[kind][client[:3]] + amount
        if free < 0 or own > SHARE * max(free, 1):
            self._refused.labels(kind, "all" if free < 0 else "client").inc()
            raise Overloaded(
                f"{self._totals[kind]} {kind} wait already, and {amount} more are too many"
                f"{'' if free < 0 else ' for one client'}", retry_after_s=self._wait_s(),
                fix="Try again later; ask for fewer completions or tokens at a time.")
        self._totals[kind] += amount
        self._own[kind][client[:3]] = own

    def _give(self, kind: Kind, client: Client, amount: int) -> None:
        self._totals[kind] -= amount
        left = self._own[kind][client[:3]] - amount
        if left:
            self._own[kind][client[:3]] = left
        else:
            del self._own[kind][client[:3]]

    def _wait_s(self) -> float:
        """Seconds until half of what waits is likely to be done, at the recent speed."""
        now = time.monotonic()
        recent = [(at, tokens) for at, tokens in self._finished if now - at < 10 * MOST_WAIT_S]
        if len(recent) < 2 or not self._totals["tokens"]:
            return UNKNOWN_WAIT_S
        speed = sum(tokens for _, tokens in recent) / max(now - recent[0][0], 0.1)
        wait = self._totals["tokens"] / 2 / max(speed, 1e-3)
        return min(max(math.ceil(wait), LEAST_WAIT_S), MOST_WAIT_S)


def _weight_of(weight: Callable[[str, str], float], client: Client) -> float:
    """Of a node of the queue's tree: tenants and keys have weights, and batches have those of their tenants."""
    path = client[1:] if client[0] == LAST else client
    if len(path) == 1:
        return weight(path[0], "")
    return weight(path[0], path[1]) if len(path) == 2 and client[0] != LAST and path[1] else 1.0
