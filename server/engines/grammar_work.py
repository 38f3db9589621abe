"""Work on grammars: in a few threads of its own, each piece bounded in time, the same piece once at a time."""

import asyncio
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import anyio

from server.engines.grammar import Grammar
from server.threads import in_thread
from steering.language.errors import EngineFailed, EngineUnavailable

# What is compiled holds its thread until it is done, also when nobody waits any more.
THREADS = 2


class GrammarWork:
    """Used on one event loop.

    Args:
        seconds: that one piece of work may take.
        prepare: done once before the first of them, and not counted: xgrammar takes seconds to import.
    """

    def __init__(self, seconds: float, prepare: Callable[[], Any] | None = None) -> None:
        self._seconds, self._prepare = seconds, prepare or partial(import_module, "xgrammar")
        self._prepared: asyncio.Task[Any] | None = None
        self._limiter: anyio.CapacityLimiter | None = None
        self._running: dict[Grammar, tuple[asyncio.Task[Any], list[bool]]] = {}

    async def done(self, grammar: Grammar, work: Callable[[Grammar], Any]) -> Any:
        """`work(grammar)`, or the result of the same that somebody else waits for.

        Raises:
            InvalidRequest: it takes too long.
            EngineUnavailable: no thread came free in that time.
        """
        await self._ready()
        found = self._running.get(grammar)
        if found is None:
            found = self._running[grammar] = self._begin(grammar, work)
        task, begun = found
        finished, _ = await asyncio.wait({task}, timeout=self._seconds)
        if finished:
            return task.result()
        if begun:
            raise grammar.refused(f"it takes more than {self._seconds:g} s to compile")
        raise EngineUnavailable("other grammars are being compiled", retry_after_s=self._seconds,
                                fix="Try again in a while.")

    async def _ready(self) -> None:
        if self._prepared is None:
            self._prepared = asyncio.create_task(in_thread(self._prepare, failure=EngineFailed))
        try:
            await asyncio.shield(self._prepared)
        except Exception:
            # Whoever comes next tries again.
            self._prepared = None
            raise

    def _begin(self, grammar: Grammar, work: Callable[[Grammar], Any]) -> tuple[asyncio.Task[Any], list[bool]]:
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(THREADS)
        begun: list[bool] = []

        def run() -> Any:
            begun.append(True)
            return work(grammar)

        task = asyncio.create_task(in_thread(run, limiter=self._limiter, failure=EngineFailed))

        def over(_: Any) -> None:
            self._running.pop(grammar, None)
            if not task.cancelled():
                # Whoever waited has it; if nobody did, nobody is left to hear of it.
                task.exception()

        task.add_done_callback(over)
        return task, begun
