"""Jobs are guests of an engine: their steps take a bounded share of its time while requests are served.

A step of a guest is one pass, or one step of a batch, and is sized so that it takes about `STEP_S`. While requests are
there, the next step of a guest begins only after they have had `WEIGHT` times as long as the last one took, so that a
request is at most 1 + 1 / WEIGHT times slower, and waits at its beginning for no more than the step that it finds under
way. Where no request is there, guests go on at once, in steps that are `ALONE` times as large, because large ones cost
less.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

STEP_S = 0.2
WEIGHT = 2.0
ALONE = 2
# Tokens of a step: the fewest that are worth one, and the most. They follow the speed of late; NEWEST is the part of it
# that the last step tells.
FEWEST, MOST = 32, 2048
FIRST = 128
NEWEST = 0.3
# How often it is looked whether requests are still there.
LOOK_S = 0.02


class Share:
    """The guests' share of one engine. `took` may be called from any thread.

    Args:
        hosts: whether requests are there.
    """

    def __init__(self, hosts: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._hosts, self.clock = hosts, clock
        self._next = 0.0
        self._tokens = float(FIRST)

    @property
    def tokens(self) -> int:
        """How many tokens a step may have."""
        return int(self._tokens) * (1 if self._hosts() else ALONE)

    def due(self) -> bool:
        """Whether a step may begin now."""
        return not self._hosts() or self.clock() >= self._next

    def took(self, seconds: float, tokens: int) -> None:
        """A step is over."""
        self._next = max(self._next, self.clock() + WEIGHT * seconds)
        fitting = tokens * STEP_S / max(seconds, 1e-6)
        # Few tokens take nearly as long as some more, so what was quick enough says nothing against more.
        if tokens and (seconds > STEP_S or fitting > self._tokens):
            self._tokens = min(max(self._tokens + NEWEST * (fitting - self._tokens), FEWEST), MOST)

    @asynccontextmanager
    async def step(self, tokens: int) -> AsyncGenerator[None]:
        """Wait for a turn; what is inside is one step of so many tokens."""
        while not self.due():
            await asyncio.sleep(LOOK_S)
        began = self.clock()
        try:
            yield
        finally:
            self.took(self.clock() - began, tokens)
