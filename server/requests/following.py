"""What other servers of the library change is made to act here, as soon as the database tells of it."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from server.observability.instruments import Counter, Gauge, Registry
from server.threads import in_thread
from vectors.library import Library


class Following:
    """From `start` to the end of the library. What it wakes also looks by itself from time to time, because a database
    may not tell of changes, or be out of reach."""

    def __init__(self, library: Library, registry: Registry, wake: Sequence[Callable[[], None]]) -> None:
        """wake: called on the event loop after a change of any server."""
        self._library, self._wake = library, wake
        Gauge("trimtab_library_followed", "1 while the library's database tells this server of changes, 0 while it is "
              "asked for them twice a second instead.", registry=registry).set_function(
                  lambda: float(library.followed is True))
        self._late = Counter("trimtab_library_late", "Changes of other servers that may have taken more than a second "
                             "to act here.", registry=registry)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()

        def changed() -> None:
            # The loop may have ended before the library does.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._all)

        await in_thread(lambda: self._library.follow(changed, self._late.inc))

    async def stop(self) -> None:
        """The library ends it."""

    def _all(self) -> None:
        for wake in self._wake:
            wake()
