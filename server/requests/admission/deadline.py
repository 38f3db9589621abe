"""How long a request may take, from its arrival to the end of its answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.errors import RequestTimeout


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(frozen=True)
class Deadline:
    """seconds: how many from now on; None for no limit."""

    seconds: float | None
    since: float = field(default_factory=_now)

    @property
    def left_s(self) -> float | None:
        return None if self.seconds is None else max(0.0, self.since + self.seconds - _now())

    @property
    def error(self) -> RequestTimeout:
        return RequestTimeout(f"the request took longer than the {self.seconds:g} s it may", param="timeout_s",
                              fix="Ask for fewer tokens, or try again when less is asked of the server.")

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Raises RequestTimeout where the body of the statement does not end in time."""
        scope = asyncio.timeout(self.left_s)
        try:
            async with scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise self.error from None
