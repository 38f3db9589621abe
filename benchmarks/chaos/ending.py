"""Trouble with what runs: an engine that fails or stalls, and a server that is told to end."""

import asyncio
import signal
from contextlib import suppress

import httpx

from benchmarks.chaos.chaos import BUSY, COMPLETE, DOWN, HANG_S, Chaos
from benchmarks.chaos.oracle import Answer, Broken, ask

# vLLM on a busy machine.
RESTART_S = 300.0


async def engine_fails(chaos: Chaos) -> None:
    """A step raises, then the engine ends: what ran gets its answer or a type, and it starts again by itself."""
    if chaos.server.engine == "transformers":
        # A step that raises is undone and computed again: nobody notices.
        async with chaos.beside():
            streams = await _streams(chaos)
            chaos.server.signal(signal.SIGUSR1)
            for answer in await asyncio.gather(*streams):
                if answer is not None and answer.code is not None:
                    chaos.fault(f"a stream of a step that raised ended with {answer.code}")
    async with chaos.beside(DOWN | BUSY):
        streams = await _streams(chaos)
        if chaos.server.engine == "vllm":
            chaos.server.engine_process().kill()
            await chaos.truth(False, "the engine was killed")
        else:
            chaos.server.signal(signal.SIGRTMIN)
        for answer in await asyncio.gather(*streams):
            if answer is not None and answer.code not in (None, *DOWN):
                chaos.fault(f"a stream of an engine that ended got {answer.code}")
        # Within this readiness has noticed.
        await asyncio.sleep(chaos.amounts.truth_s)
        await chaos.readiness.until(True, RESTART_S)


async def _streams(chaos: Chaos) -> list["asyncio.Task[Answer | None]"]:
    """Some that run for a while."""
    body = chaos.completion(stream=True, max_tokens=150, ignore_eos=True)
    streams = [asyncio.create_task(chaos.try_(COMPLETE, body)) for _ in range(4)]
    await asyncio.sleep(0.5)
    return streams


async def engine_stalls(chaos: Chaos) -> None:
    """The engine stops without a word, for longer than anyone waits."""
    if chaos.server.engine == "vllm":
        process = chaos.server.engine_process()
        process.suspend()
    else:
        chaos.server.signal(signal.SIGUSR2)
    stuck = asyncio.create_task(chaos.try_(COMPLETE, chaos.completion()))
    try:
        await chaos.readiness.until(False, chaos.amounts.stall_s)
        chaos.notes.append("engine_stalls: noticed")
    except TimeoutError:
        chaos.fault(f"a stalled engine is ready still after {chaos.amounts.stall_s:.0f} s")
    finally:
        if chaos.server.engine == "vllm":
            with suppress(Exception):
                process.resume()
        else:
            chaos.server.signal(signal.SIGUSR2)
    answer = await stuck
    if answer is not None and answer.code not in (None, *DOWN, *BUSY, "request_timeout"):
        chaos.fault(f"a request of a stalled engine got {answer.code}")


async def terminate(chaos: Chaos) -> None:
    """SIGTERM under load: everything open ends in a typed way, nothing is traced, and the exit code is 0."""
    offset = chaos.server.log.stat().st_size
    ended: list[str] = []

    async def request(stream: bool) -> None:
        body = chaos.completion(stream=stream, max_tokens=200, ignore_eos=True)
        try:
            async with asyncio.timeout(HANG_S):
                answer = await ask(chaos.http, COMPLETE, body)
            ended.append(answer.code or "whole")
        except httpx.ConnectError:
            ended.append("not taken any more")
        except (Broken, httpx.HTTPError, TimeoutError) as error:
            chaos.fault(f"a request was broken off by SIGTERM (stream={stream}): {error!r}")

    tasks = [asyncio.create_task(request(number % 2 == 0)) for number in range(16)]
    await asyncio.sleep(1)
    chaos.server.signal(signal.SIGTERM)
    try:
        code = await chaos.server.wait(chaos.amounts.drain_s)
        if code != 0:
            chaos.fault(f"exit code {code} after SIGTERM")
    except TimeoutError as error:
        chaos.fault(f"SIGTERM: {error}")
        await chaos.server.kill()
    await asyncio.gather(*tasks)
    chaos.counts.update(f"ended by SIGTERM: {how}" for how in ended)
    if "Traceback" in (said := chaos.server.written_since(offset)):
        chaos.fault(f"a traceback after SIGTERM: {said[said.index('Traceback'):][:1500]}")
