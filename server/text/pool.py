"""Threads of their own for work on texts: templates, tokenising, roles.

Long texts have a lane to themselves, so a short one never waits for the seconds that a megabyte may take; neither ever
waits for a thread that something else holds, the library's database say.
"""

from collections.abc import Callable
from typing import TypeVar

import anyio

from server.threads import in_thread

T = TypeVar("T")
LONG_CHARACTERS = 2**16
SHORT_AT_ONCE, LONG_AT_ONCE = 4, 1


class TextPool:
    def __init__(self) -> None:
        self._short = anyio.CapacityLimiter(SHORT_AT_ONCE)
        self._long = anyio.CapacityLimiter(LONG_AT_ONCE)

    async def run(self, work: Callable[[], T], characters: int) -> T:
        """The result of `work` on a text of so many characters."""
        limiter = self._long if characters > LONG_CHARACTERS else self._short
        return await in_thread(work, limiter=limiter)
