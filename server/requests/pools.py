"""Pools of threads for work that blocks: work that waits for a database keeps no thread from completions.

Routes that are plain functions, the library's above all, run in the pool that FastAPI has for them.
"""

from collections.abc import Callable
from typing import TypeVar

import anyio

from server.threads import in_thread

T = TypeVar("T")
COMPLETIONS = 40
UPLOADS = 2
WATCHING = 2
READING = 2


class Pools:
    """
    Attributes:
        uploads: how many uploads are taken in at once; each is held in memory.
    """

    def __init__(self) -> None:
        self._completions = anyio.CapacityLimiter(COMPLETIONS)
        self._watching = anyio.CapacityLimiter(WATCHING)
        self._reading = anyio.CapacityLimiter(READING)
        self.uploads = anyio.CapacityLimiter(UPLOADS)

    async def complete(self, work: Callable[[], T]) -> T:
        """Run a step of a completion that may ask the library."""
        return await in_thread(work, limiter=self._completions)

    async def watch(self, work: Callable[[], T]) -> T:
        """Run what tells how the server does."""
        return await in_thread(work, limiter=self._watching)

    async def read(self, work: Callable[[], T]) -> T:
        """Parse and validate a long body."""
        return await in_thread(work, limiter=self._reading)
