"""How long each replica, or the machine, did nothing at all: what the oracles must not blame on replicas.

A replica is asked for `/health` ten times a second, which needs neither thread nor database nor engine. An answer that
takes long says that its process, or the one of the test, had no processor for that long.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from tests.fleet.cluster import Replica
from tests.fleet.load import NEVER, now

EVERY_S = 0.1


@dataclass
class Beat:
    replica: str
    sent: float
    answered: float = NEVER


@dataclass
class Heartbeat:
    beats: list[Beat] = field(default_factory=list)

    def stall(self, replica: str, since: float, until: float) -> float:
        """The longest beat of the replica in that time."""
        return max((min(beat.answered, until) - beat.sent for beat in self.beats
                    if beat.replica == replica and beat.answered >= since and beat.sent <= until), default=0.0)

    def worst(self) -> dict[str, tuple[float, float]]:
        """The longest beat of each replica, and when it began."""
        found: dict[str, tuple[float, float]] = {}
        for beat in self.beats:
            found[beat.replica] = max(found.get(beat.replica, (0.0, 0.0)), (beat.answered - beat.sent, beat.sent))
        return found

    @asynccontextmanager
    async def listening(self, alive: Callable[[], Sequence[Replica]]) -> AsyncIterator[None]:
        task = asyncio.create_task(self._listen(alive))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _listen(self, alive: Callable[[], Sequence[Replica]]) -> None:
        asked: set[str] = set()
        async with httpx.AsyncClient(timeout=60) as client, asyncio.TaskGroup() as group:
            while True:
                for replica in alive():
                    if replica.name not in asked:
                        asked.add(replica.name)
                        group.create_task(self._beat(client, replica))
                await asyncio.sleep(EVERY_S)

    async def _beat(self, client: httpx.AsyncClient, replica: Replica) -> None:
        while replica.alive:
            beat = Beat(replica.name, now())
            try:
                await client.get(f"{replica.url}/health")
            except httpx.TransportError:
                # It starts, or it has ended.
                await asyncio.sleep(EVERY_S)
                continue
            beat.answered = now()
            self.beats.append(beat)
            await asyncio.sleep(EVERY_S)
