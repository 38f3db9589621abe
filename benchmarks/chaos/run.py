"""One run: start the server, learn what the innocents get alone, then trouble after trouble."""

import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chaos.chaos import HANG_S, TIMEOUT_S, Amounts, Chaos, log
from benchmarks.chaos.harness import Readiness, Server
from benchmarks.chaos.oracle import Innocents
from benchmarks.chaos.scenarios import SCENARIOS
from benchmarks.chaos.storing import Storing

# A scenario that has not ended by then hangs.
SCENARIO_S = 1200.0
NUM_INNOCENTS = 16
# By turns: a cache that three long requests fill, and one with room.
SETTINGS: tuple[dict[str, object], ...] = tuple(
    {"kv_cache_tokens": tokens, "max_requests": 32, "slots": 16, "queue_requests": 200, "queue_tokens": 16384,
     "request_timeout_s": TIMEOUT_S, "engine_stall_s": 10, "shutdown_s": 5,
     "log_format": "json"} for tokens in (528, 8192))
# Resident memory may grow by this from the first rounds to the last: allocators and caches are never quite still.
GROWTH_MIB = 96.0


async def run(model: str, engine: str, seed: int, amounts: Amounts, minutes: float,
              only: Sequence[str] | None = None) -> dict[str, Any]:
    """Results as data. `faults` is empty if all went well."""
    chance = random.Random(seed)
    names = list(only or SCENARIOS)
    settings = itertools.cycle(SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), model, engine)
        try:
            await server.start(**next(settings))
            async with httpx.AsyncClient(base_url=server.url, timeout=HANG_S,
                                         limits=httpx.Limits(max_connections=200)) as http:
                return await _rounds(server, http, settings, chance, amounts, minutes, names)
        finally:
            await server.close()


async def _rounds(server: Server, http: httpx.AsyncClient, settings: Iterator[dict[str, object]],
                  chance: random.Random, amounts: Amounts, minutes: float, names: list[str]) -> dict[str, Any]:
    facts = (await http.get("/v1/capabilities")).json()
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    innocents = Innocents(model, facts["d_model"], facts["num_layers"], chance.randrange(10**6))
    chaos = Chaos(server, http, Readiness(), innocents, Storing(facts["d_model"], chance), chance, settings,
                  amounts)
    chaos.scenario = "alone"
    await innocents.learn(http, NUM_INNOCENTS)
    await chaos.store()
    started, rounds, memory = time.monotonic(), 0, []
    async with chaos.readiness.watching(server):
        while rounds == 0 or time.monotonic() - started < 60 * minutes:
            rounds += 1
            for name in chance.sample(names, len(names)):
                if rounds > 1 and time.monotonic() - started >= 60 * minutes:
                    break
                await _scenario(chaos, name)
                memory.append(round(server.memory_mib()))
            log.print(f"{(time.monotonic() - started) / 60:.1f} min, round {rounds}: {dict(chaos.counts)}, "
                          f"{len(chaos.faults)} faults, {memory[-1]} MiB", markup=False)
    chaos.scenario = "memory"
    _flat(chaos, memory, len(names))
    return {"engine": server.engine, "model": model, "minutes": round((time.monotonic() - started) / 60, 1),
            "rounds": rounds, "counts": dict(chaos.counts), "notes": chaos.notes[-40:], "memory_mib": memory,
            "slowest_readiness_s": round(chaos.readiness.slowest_s, 2), "faults": chaos.faults}


async def _scenario(chaos: Chaos, name: str) -> None:
    chaos.scenario = name
    started, broken = time.monotonic(), True
    try:
        async with asyncio.timeout(SCENARIO_S):
            await SCENARIOS[name](chaos)
            if not chaos.server.running:
                await chaos.restart()
            await chaos.calm()
    except TimeoutError as error:
        chaos.fault(f"it did not end in time: {error}")
    except httpx.HTTPError as error:
        chaos.fault(f"the server did not answer: {error!r}")
    else:
        broken = False
    if broken:
        # Those that come next are to find faults of their own.
        await chaos.server.kill()
        await chaos.restart()
    log.print(f"  {name}: {time.monotonic() - started:.0f} s, {len(chaos.faults)} faults so far", markup=False)


def _flat(chaos: Chaos, memory: list[int], per_round: int) -> None:
    """Only of a run of several rounds: in the first one caches fill up."""
    settled, last = memory[per_round:2 * per_round], memory[-per_round:]
    if len(memory) >= 3 * per_round and (grown := statistics.median(last) - statistics.median(settled)) > GROWTH_MIB:
        chaos.fault(f"{grown:.0f} MiB more in the last round than in the second: {memory}")
