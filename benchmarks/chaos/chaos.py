"""What all scenarios share: the server, the innocents beside them, and the faults that were found."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console

from benchmarks.chaos.harness import Readiness, Server
from benchmarks.chaos.oracle import Answer, Body, Broken, Innocent, Innocents, ask, brief
from benchmarks.chaos.storing import Storing

# The server's own limit on a request, and when it has not kept it.
TIMEOUT_S = 60.0
COMPLETE = "/v1/completions"
HANG_S = 90.0
CALM_S = 60.0
log = Console(stderr=True, width=200)
NONE: frozenset[str] = frozenset()
BUSY = frozenset({"overloaded", "slots_exhausted"})
DOWN = frozenset({"engine_unavailable", "shutting_down"})


@dataclass(frozen=True)
class Amounts:
    """How much is done, and how long it may take.

    Attributes:
        size: factor on requests of a scenario.
        mixed: requests asked alone and then together.
        uploads: acknowledged uploads before the last of `kills` ends the server.
        mutations: files with bytes changed.
        truth_s: seconds within which readiness must tell the truth.
        stall_s: seconds within which a stalled engine must be noticed.
        drain_s: seconds within which SIGTERM must end the server.
    """

    size: int = 1
    mixed: int = 24
    uploads: int = 40
    kills: int = 1
    mutations: int = 40
    truth_s: float = 2.0
    stall_s: float = 30.0
    drain_s: float = 90.0


@dataclass
class Chaos:
    """`settings`: of the server, for each start. `amounts`: of each scenario. `faults`: what must not have happened."""

    server: Server
    http: httpx.AsyncClient
    readiness: Readiness
    innocents: Innocents
    storing: Storing
    random: random.Random
    settings: Iterator[dict[str, object]]
    amounts: Amounts
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scenario: str = ""

    def fault(self, what: str) -> None:
        self.faults.append(f"{self.scenario}: {what}")
        log.print(self.faults[-1], style="red", markup=False, highlight=False)

    async def try_(self, path: str, body: Body, http: httpx.AsyncClient | None = None) -> Answer | None:
        """An answer, or None and a fault: no answer in time, or one that cannot be read."""
        try:
            async with asyncio.timeout(HANG_S):
                answer = await ask(http or self.http, path, body)
        except TimeoutError:
            self.fault(f"no answer within {HANG_S:.0f} s: {path} {brief(body)}")
        except Broken as broken:
            self.fault(f"{broken}: {path} {brief(body)}")
        except httpx.HTTPError as error:
            self.fault(f"the connection broke ({error!r}): {path} {brief(body)}")
        else:
            if answer.code == "internal_error":
                self.fault(f"internal_error: {path} {brief(body)}")
            return answer
        return None

    async def check(self, innocent: Innocent, refusals: frozenset[str] = NONE) -> bool:
        """Ask an innocent request; False if it was refused with one of the codes that stand in `refusals`."""
        answer = await self.try_(innocent.path, innocent.body)
        self.counts["innocent"] += 1
        if answer is None or innocent.alone is None:
            return True
        if answer.code is not None:
            self.counts[f"innocent refused: {answer.code}"] += 1
            if answer.code not in refusals:
                self.fault(f"an innocent request got {answer.status} {answer.code}: {brief(innocent.body)}")
            elif answer.status == 503 and answer.retry_after is None:
                self.fault(f"503 {answer.code} without Retry-After")
            return False
        if not answer.same_as(innocent.alone):
            self.fault(f"another answer than alone: {innocent.path} {brief(innocent.body)}: {answer.texts} "
                       f"applied {answer.steered}, alone {innocent.alone.texts} applied {innocent.alone.steered}")
        return True

    @asynccontextmanager
    async def beside(self, refusals: frozenset[str] = NONE, clients: int = 2) -> AsyncIterator[None]:
        """Innocent requests all the time, from several clients, while the block runs. Each client asks at least two."""
        over = asyncio.Event()

        async def client() -> None:
            asked = 0
            while not over.is_set() or asked < 2:
                asked += 1
                if not await self.check(self.random.choice(self.innocents.known), refusals):
                    await asyncio.sleep(0.2)

        tasks = [asyncio.create_task(client()) for _ in range(clients)]
        try:
            yield
        finally:
            over.set()
            await asyncio.gather(*tasks)

    async def calm(self) -> None:
        """The server is idle and whole again: nothing runs or is held, it says ready, and the innocents are right."""
        try:
            await self.readiness.until(True, CALM_S)
        except TimeoutError:
            self.fault(f"not ready {CALM_S:.0f} s after it was over")
            # Those that come next are to find faults of their own.
            await self.server.kill()
            await self.restart()
        deadline = asyncio.get_running_loop().time() + CALM_S
        while held := await self._held():
            if asyncio.get_running_loop().time() > deadline:
                self.fault(f"still held {CALM_S:.0f} s after it was over: {held}")
                break
            await asyncio.sleep(0.2)
        for innocent in self.random.sample(self.innocents.known, min(4, len(self.innocents.known))):
            await self.check(innocent)

    async def _held(self) -> dict[str, float]:
        """Gauges of the engine that are not zero on an idle one."""
        found = {}
        for line in (await self.http.get("/metrics")).text.splitlines():
            for stat in ("running", "waiting", "slots_used"):
                if line.startswith(f'trimtab_engine{{stat="{stat}"}}') and (value := float(line.split()[-1])):
                    found[stat] = value
        return found

    async def truth(self, ready: bool, what: str, timeout_s: float = CALM_S) -> None:
        """Readiness says so within two seconds."""
        try:
            took = await self.readiness.until(ready, timeout_s)
        except TimeoutError:
            self.fault(f"{what}: readiness does not say {ready} within {timeout_s:.0f} s")
            return
        self.notes.append(f"{self.scenario}: readiness said {ready} {took:.1f} s after {what}")
        if took > self.amounts.truth_s:
            self.fault(f"{what}: readiness said {ready} after {took:.1f} s only")

    def completion(self, **changes: Any) -> Body:
        return {"model": self.innocents.model, "prompt": "The cat sat near", "max_tokens": 8, **changes}

    async def store(self, **how: Any) -> Answer | None:
        """Upload something new; None and a fault if there was no answer that can be read."""
        try:
            async with asyncio.timeout(HANG_S):
                answer = await self.storing.store(self.http, **how)
        except (TimeoutError, Broken, httpx.HTTPError) as error:
            self.fault(f"an upload: {error!r}")
            return None
        self.counts["uploads" if answer.status == 201 else f"uploads refused: {answer.code}"] += 1
        if answer.code == "internal_error":
            self.fault("an upload got internal_error")
        return answer

    async def nothing_lost(self) -> None:
        for wrong in await self.storing.lost(self.http):
            self.fault(wrong)

    async def restart(self) -> None:
        """Start the server again on the same data, with the next of the settings; what was stored is there."""
        started = asyncio.get_running_loop().time()
        await self.server.start(**next(self.settings))
        self.http.base_url = httpx.URL(self.server.url)
        self.counts["restarts"] += 1
        self.notes.append(f"{self.scenario}: started again in {asyncio.get_running_loop().time() - started:.0f} s")
        await self.nothing_lost()
