"""Quotas: how many requests and tokens a tenant or a key may use in a time, and how many requests at once.

A request is counted when it arrives, before its body is read; its tokens when they are known, and again, by what it
really took, at its end. Minutes, days and months are those of the clock (UTC), so all replicas mean the same ones, and
what is given back goes back to the time it was taken from.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Protocol

import anyio

from server.errors import QuotaExceeded, RateLimited
from server.identity.counters import Amount, Counters, Place
from server.identity.policy import Held, Period, Policy
from server.identity.principal import Principal
from server.observability.instruments import Counter, Registry

Of = Literal["requests", "tokens"]
KINDS: tuple[Of, ...] = ("requests", "tokens")
MINUTE_S = 60
# In the state of a request's scope: what it has taken.
QUOTA = "quota"
# How much longer than its time a counter is kept, for clocks that differ.
SLACK_S = 60
# What is tried again may find a place soon, and nobody knows when.
PLACE_WAIT_S = 1.0
# Policies whose windows are remembered.
MOST_KNOWN = 4096


class Used(Protocol):
    """What a request took in the end."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def completion_tokens(self) -> int: ...


@dataclass(frozen=True)
class Window:
    """A limit on what may be used in a time. seconds: for which its counter is kept. ends: seconds since 1970."""

    held: Held
    of: Of
    most: int
    period: Literal["minute"] | Period
    key: str
    seconds: int
    ends: float

    @property
    def told(self) -> str:
        return f"{self.of} a {self.period}"

    def refusal(self, now: float, asked: int) -> RateLimited:
        told = f"the quota of {self.held.of} is {self.most} {self.told}"
        fix = f"Try again in {spelled(self.ends - now)}." if asked <= self.most else "Ask for fewer tokens at a time."
        kind = RateLimited if self.period == "minute" else QuotaExceeded
        return kind(told, retry_after_s=max(self.ends - now, 1.0), fix=fix)


@dataclass(frozen=True)
class Usage:
    window: Window
    used: int
    reset_s: float


@dataclass(frozen=True)
class Left:
    """What is left of a limit, for a header."""

    most: int
    remaining: int
    reset_s: float


@dataclass
class Asked:
    """What one request has taken of the quotas that hold for it."""

    quotas: "Quotas"
    held: Sequence[Held]
    id: str
    # Tells at its end what it took; None where that is known before.
    used: Used | None = None
    left: dict[Of, Left] = field(default_factory=dict)
    _places: list[Place] = field(default_factory=list)
    _tokens: list[Window] = field(default_factory=list)
    _shared: bool = False
    _expected: int = 0

    @property
    def headers(self) -> dict[str, str]:
        """As OpenAI names them, of the limit that has the least left."""
        return {f"x-ratelimit-{what}-{of}": value for of, left in self.left.items() for what, value in (
            ("limit", str(left.most)), ("remaining", str(left.remaining)), ("reset", spelled(left.reset_s)))}

    async def enter(self) -> None:
        """Raises RateLimited."""
        limited = [(one, most) for one in self.held if (most := one.quota.parallel_requests) is not None]
        places = [Place(one.scope, self.id, most) for one, most in limited]
        windows = self.quotas.windows(self.held, "requests")
        if not places and not windows:
            return
        over = await self._book(places, windows, "requests", 1)
        if over is not None:
            one, most = limited[over]
            self.quotas.refused.labels("parallel").inc()
            raise RateLimited(f"the quota of {one.of} is {most} requests at once", retry_after_s=PLACE_WAIT_S,
                              fix="Wait for one of them to end.")
        self._places = places

    async def tokens(self, expected: int) -> None:
        """Count the tokens that the request is likely to take. Raises RateLimited, QuotaExceeded."""
        windows = self.quotas.windows(self.held, "tokens")
        if windows:
            await self._book((), windows, "tokens", expected)
            self._tokens, self._expected = windows, expected

    async def leave(self) -> None:
        over = 0 if self.used is None else self.used.prompt_tokens + self.used.completion_tokens - self._expected
        amounts = [Amount(window.key, over, window.seconds) for window in self._tokens] if over else []
        if self._places or amounts:
            await self.quotas.counters.settle(self._places, amounts, shared=self._shared)

    async def _book(self, places: Sequence[Place], windows: Sequence[Window], of: Of, amount: int) -> int | None:
        """Index of a place that is not free. Raises RateLimited, QuotaExceeded."""
        counters, now = self.quotas.counters, self.quotas.now()
        booked = await counters.book(places, [Amount(one.key, amount, one.seconds, one.most) for one in windows])
        self._shared = booked.shared
        if booked.over is not None and booked.over < len(places):
            return booked.over
        if booked.over is not None:
            n = booked.over - len(places)
            self._told(windows[n], of, max(windows[n].most - booked.totals[n] + amount, 0), now)
            self.quotas.refused.labels(of if windows[n].period == "minute" else "period").inc()
            raise windows[n].refusal(now, amount)
        for window, total in zip(windows, booked.totals, strict=True):
            self._told(window, of, window.most - total, now)
        return None

    def _told(self, window: Window, of: Of, remaining: int, now: float) -> None:
        known = self.left.get(of)
        if known is None or remaining < known.remaining:
            self.left[of] = Left(window.most, remaining, window.ends - now)


# The request that is answered in this context; None where no quota holds for it.
ASKED: ContextVar[Asked | None] = ContextVar("asked", default=None)


class Quotas:
    def __init__(self, counters: Counters, registry: Registry, now: Callable[[], float] = time.time) -> None:
        self.counters, self.now = counters, now
        self.refused = Counter("trimtab_quota_refused", "Requests that a quota refused, by what was used up "
                               "(requests, tokens, parallel, period).", ["of"], registry=registry)
        self._windows: dict[tuple[str, Of], tuple[int, Policy, list[Window]]] = {}

    def windows(self, held: Sequence[Held], of: Of) -> list[Window]:
        """The limits of this kind that hold now. Those of a policy are the same for a whole minute of the clock."""
        now = self.now()
        minute = int(now) // MINUTE_S
        found: list[Window] = []
        for one in held:
            known = self._windows.get((one.scope, of))
            if known is None or known[0] != minute or known[1] is not one.policy:
                if len(self._windows) >= MOST_KNOWN:
                    self._windows.clear()
                known = self._windows[one.scope, of] = (minute, one.policy, windows([one], of, now))
            found += known[2]
        return found

    async def start(self) -> None:
        await self.counters.start()

    async def stop(self) -> None:
        await self.counters.stop()

    @asynccontextmanager
    async def holding(self, who: Principal, request_id: str) -> AsyncIterator[Asked | None]:
        """A request under the quotas of who asks, from its begin to the end of its answer.

        Raises:
            RateLimited, QuotaExceeded.
        """
        held = [one for one in who.policies if one.policy.quota is not None]
        if not held:
            yield None
            return
        asked = Asked(self, held, request_id)
        token = ASKED.set(asked)
        try:
            yield asked
        finally:
            ASKED.reset(token)
            with anyio.CancelScope(shield=True):
                await asked.leave()

    async def usage(self, who: Principal) -> list[Usage]:
        """What is used of each limit that holds for a key."""
        now = self.now()
        limits = [one for of in KINDS for one in windows(who.policies, of, now)]
        booked = await self.counters.book((), [Amount(one.key, 0, one.seconds) for one in limits])
        return [Usage(one, total, round(one.ends - now, 3))
                for one, total in zip(limits, booked.totals, strict=True)]


async def count_tokens(expected: int) -> None:
    """Count the tokens of the request that is answered in this context. Raises RateLimited, QuotaExceeded."""
    asked = ASKED.get()
    if asked is not None:
        await asked.tokens(expected)


def tokens_used(used: Used) -> None:
    """What the request of this context will have taken at its end, in the place of what was expected."""
    asked = ASKED.get()
    if asked is not None:
        asked.used = used


def windows(held: Sequence[Held], of: Of, now: float) -> list[Window]:
    """The limits of this kind, of the present minute, day or month."""
    found = []
    for one in held:
        quota = one.quota
        limits: list[tuple[int | None, Literal["minute"] | Period]] = [
            (quota.requests_per_minute if of == "requests" else quota.tokens_per_minute, "minute")]
        if of == "tokens":
            limits.append((quota.tokens_per_period, quota.period))
        for most, period in limits:
            if most is not None:
                begins, ends = bounds(period, now)
                found.append(Window(one, of, most, period, f"{one.scope}/{of}/{period}/{begins}",
                                    int(ends - begins) + SLACK_S, ends))
    return found


def bounds(period: Literal["minute"] | Period, now: float) -> tuple[int, int]:
    """When the present one began and when it ends, in seconds since 1970."""
    if period == "minute":
        begins = int(now) // MINUTE_S * MINUTE_S
        return begins, begins + MINUTE_S
    at = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return int(at.timestamp()), int(at.timestamp()) + 86400
    first = at.replace(day=1)
    following = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return int(first.timestamp()), int(following.timestamp())


def spelled(seconds: float) -> str:
    """As OpenAI writes a duration: 120ms, 6s, 1m30s, 2h0m5s."""
    if seconds < 1:
        return f"{max(round(seconds * 1000), 0)}ms"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{whole % 60}s"

