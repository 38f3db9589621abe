"""Where quotas are counted: what is asked of it, and the counters of one server.

A request asks three times: for its place and its count when it arrives, for its tokens when they are known, and to give
back at its end. Each time all limits that hold for it are asked at once, so that it is counted by all or by none.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

# How often counters are looked for whose time is over.
SWEEP_S = 60.0


class Place(NamedTuple):
    """One of `most` places that may be taken at once, by `holder`."""

    key: str
    holder: str
    most: int


class Amount(NamedTuple):
    """What is added to a counter that is forgotten `seconds` after its first use. most: None for no limit."""

    key: str
    amount: int
    seconds: int
    most: int | None = None


class Booked(NamedTuple):
    """
    Attributes:
        totals: of each amount's counter, with the amount; where something was over, what they would have been.
        over: index of the first that was over, the places counted before the amounts; None where all was booked.
        shared: whether all replicas have counted it.
    """

    totals: Sequence[int]
    over: int | None
    shared: bool


class Counters(Protocol):
    async def book(self, places: Sequence[Place], amounts: Sequence[Amount]) -> Booked:
        """Take the places and add the amounts, or do nothing where one is over."""

    async def settle(self, places: Sequence[Place], amounts: Sequence[Amount], *, shared: bool) -> None:
        """Give places back, and add to counters that still count, or take from them.

        Args:
            shared: whether the amounts were counted by all replicas.
        """

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def follow(self, url: str, timeout_s: float) -> None:
        """Count in this Redis from now on, where any is asked."""


class LocalCounters:
    """Of one server. They begin anew with it.

    Args:
        clock: seconds, never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._places: defaultdict[str, set[str]] = defaultdict(set)
        self._totals: dict[str, int] = {}
        self._until: dict[str, float] = {}
        self._swept = clock()

    async def start(self) -> None:
        return

    async def stop(self) -> None:
        return

    def follow(self, url: str, timeout_s: float) -> None:
        return

    async def book(self, places: Sequence[Place], amounts: Sequence[Amount]) -> Booked:
        now = self._clock()
        if now - self._swept >= SWEEP_S:
            self._sweep(now)
        for n, place in enumerate(places):
            if len(self._places.get(place.key, ())) >= place.most:
                return Booked((), n, shared=False)
        totals = [self._total(one.key, now) + one.amount for one in amounts]
        for n, (one, total) in enumerate(zip(amounts, totals, strict=True), len(places)):
            if one.most is not None and total > one.most:
                return Booked(totals, n, shared=False)
        for place in places:
            self._places[place.key].add(place.holder)
        for one, total in zip(amounts, totals, strict=True):
            if one.key not in self._totals:
                self._until[one.key] = now + one.seconds
            self._totals[one.key] = total
        return Booked(totals, None, shared=False)

    async def settle(self, places: Sequence[Place], amounts: Sequence[Amount], *, shared: bool) -> None:
        for place in places:
            held = self._places.get(place.key)
            if held is not None:
                held.discard(place.holder)
                if not held:
                    del self._places[place.key]
        for one in amounts:
            if one.key in self._totals:
                self._totals[one.key] += one.amount

    def _total(self, key: str, now: float) -> int:
        if self._until.get(key, now) < now:
            del self._totals[key], self._until[key]
        return self._totals.get(key, 0)

    def _sweep(self, now: float) -> None:
        self._swept = now
        for key in [key for key, until in self._until.items() if until < now]:
            del self._totals[key], self._until[key]
