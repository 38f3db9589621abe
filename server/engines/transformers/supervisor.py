"""Keeps the batching loop running: starts it, watches that it advances, and starts it again.

When the loop ends, completions of its last step are failed, as one of them may be why; the others go on from their
tokens in the next loop. A thread that hangs cannot be ended: then only a new process helps, and `condition` says so.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Literal

import structlog

from server.engines.data import Condition, Unready
from server.engines.transformers.options import EngineOptions
from server.engines.transformers.running import Running
from server.engines.transformers.steps import Steps
from server.engines.transformers.stock import Manager
from server.engines.watching import BackOff, Progress
from server.threads import in_thread
from steering.language.errors import EngineUnavailable, TrimtabError

log = structlog.get_logger(__name__)
WATCH_S = 0.2
# How long the loop has for the step that it is in, when it is told to end.
END_S = 10.0
# How often one completion may be taken over into another loop.
MOST_MOVES = 1
Fault = Literal["restarting", "stalled"]


class Supervisor:
    """Used on the event loop.

    Args:
        make: makes a manager that has not started. In a thread.
        prove: awaited with the loop running, before others are served. What it raises counts as a failed start.
        advanced: steps and passes so far, and whether any work waits.

    Attributes:
        manager: the loop that runs now, if one does.
    """

    def __init__(self, options: EngineOptions, steps: Steps, *, make: Callable[[], Manager],
                 prove: Callable[[], Awaitable[None]], advanced: Callable[[], tuple[int, bool]]) -> None:
        self._options, self._steps, self._roster = options, steps, steps.roster
        self._make, self._prove, self._advanced = make, prove, advanced
        self.manager: Manager | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._progress = Progress(options.stall_s)
        self._back_off = BackOff(options.back_off_s, options.restart_limit, options.stall_s)
        self._reason: Unready | None = "starting"
        self._live = True
        self._proving = False
        self._due = 0.0
        self._took_s = 0.0
        self._epoch = 0
        self._restarts: Counter[Unready] = Counter({"restarting": 0, "stalled": 0})

    async def start(self) -> None:
        """
        Raises:
            TrimtabError: the loop does not start, or what it does is not right.
        """
        await self._launch()
        self._reason = None
        self._back_off.started()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        self._reason = "stopped"
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        self._fail(list(self._roster.completions), self.condition().error)
        if not await self._end(END_S):
            log.error("engine_left_behind")

    @property
    def usable(self) -> Manager | None:
        """The loop, if a measurement may use it."""
        if self.manager is None or not self.manager.is_running() or not (self._reason is None or self._proving):
            return None
        return self.manager

    def restarts(self) -> Mapping[Unready, int]:
        return self._restarts

    def condition(self) -> Condition:
        if self._reason is not None:
            waits = self._reason in ("restarting", "stalled")
            due = max(1.0, self._due - time.monotonic()) if waits else None
            return Condition(ready=False, live=self._live, reason=self._reason, retry_after_s=due)
        if self.manager is None or not self.manager.is_running():
            # It ended just now; the watcher will see to it.
            return Condition(ready=False, reason="restarting", retry_after_s=max(1.0, self._took_s))
        return Condition(ready=True)

    def enqueue(self, running: Running) -> None:
        """Give a completion to the loop, now or when the next one runs.

        Raises:
            EngineUnavailable: there will be none.
        """
        if self._reason == "stopped" or not self._live:
            raise self.condition().error()
        if self.manager is not None and self._accepts(self.manager, running):
            running.epoch = self._epoch

    def leave(self, running: Running) -> None:
        """Drop a completion, wherever it is."""
        if not self._roster.leave(running):
            return
        if self.manager is None or running.epoch != self._epoch:
            # No loop knows of it.
            self._roster.retire(running.request_id)
        else:
            # Also wakes the loop.
            self.manager.cancel_request(running.request_id)

    def _accepts(self, manager: Manager, running: Running) -> bool:
        sampling = running.generation.sampling
        stops = [-1] if sampling.ignore_eos or not sampling.stop_token_ids else list(sampling.stop_token_ids)
        return manager.add_request(
            list(running.token_ids), request_id=running.request_id, max_new_tokens=sampling.max_tokens - running.before,
            streaming=True, eos_token_id=stops) is not None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            fault = self._fault()
            if fault is not None:
                try:
                    await self._recover(fault)
                except Exception:
                    # Whoever watches must not be the one that ends; what is wrong is found again at once.
                    log.exception("engine_watch_failed")

    def _fault(self) -> Fault | None:
        if self.manager is None or not self.manager.is_running():
            return "restarting"
        return "stalled" if self._progress.stalled(*self._advanced()) else None

    async def _recover(self, fault: Fault) -> None:
        """Have another loop run, however long that takes."""
        self._reason, self._due = fault, time.monotonic() + END_S + self._took_s
        log.error("engine_stalled" if fault == "stalled" else "engine_died", restarts=sum(self._restarts.values()),
                  error=self._cause())
        self._fail(self._lost(fault), self.condition().error)
        if fault == "stalled" and self.manager is not None:
            # Who waits in a thread for a pause of this loop waits no longer.
            self.manager.background_thread_status.record_fatal_error(TimeoutError("it made no progress"))
        await self._until_ended()
        while True:
            wait_s = self._back_off.next()
            self._live = not self._back_off.exhausted
            self._reason = fault if self._live else "exhausted"
            self._due = time.monotonic() + wait_s + self._took_s
            await asyncio.sleep(wait_s)
            try:
                await self._launch()
                break
            except Exception:
                # Whatever it was, the next attempt is all that can be done; readiness says 503 meanwhile.
                log.exception("engine_restart_failed")
                self._fail(list(self._roster.completions), self.condition().error)
                await self._until_ended()
        self._restarts[fault] += 1
        self._reason, self._live = None, True
        self._back_off.started()
        self._take_over()
        log.info("engine_restarted", reason=fault, restarts=sum(self._restarts.values()))

    async def _launch(self) -> None:
        began = time.monotonic()
        manager = await in_thread(self._make)
        self._epoch += 1
        self.manager = manager
        manager.start()
        self._progress = Progress(self._options.stall_s)
        self._proving = True
        proving = asyncio.ensure_future(self._prove())
        try:
            while not (await asyncio.wait({proving}, timeout=WATCH_S))[0]:
                if self._fault() is not None:
                    why = f"the batching loop ended: {self._cause()}"
                    self._fail([c.running.request_id for c in list(self._roster.completions.values())
                                if c.running.epoch == self._epoch], partial(EngineUnavailable, why))
                    await asyncio.wait({proving}, timeout=END_S)
                    if not proving.done():
                        raise EngineUnavailable("the batching loop made no progress when it was tried")
            proving.result()
        finally:
            self._proving = False
            proving.cancel()
        self._took_s = time.monotonic() - began

    async def _until_ended(self) -> None:
        """End the loop, however long that takes: no other may run beside it, as both would use the model's hooks."""
        while not await self._end(END_S):
            if self._live:
                log.critical("engine_hangs")
            self._reason, self._live = "hung", False
            self._fail(list(self._roster.completions), self.condition().error)

    def _cause(self) -> str | None:
        """What ended the loop."""
        error = None if self.manager is None else self.manager.background_thread_status.fatal_error
        return None if error is None else f"{type(error).__name__}: {error}"[:300]

    async def _end(self, limit_s: float) -> bool:
        """End the loop. False: it is still in its step after `limit_s`."""
        manager = self.manager
        if manager is None:
            return True
        manager.end_soon()
        until = time.monotonic() + limit_s
        while manager.is_running():
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.02)
        self.manager = None
        # Its frames hold the cache.
        manager.background_thread_status.fatal_error = None
        # Gives the cache back, and the model its attention.
        await in_thread(partial(manager.stop, block=True, hard_stop=True))
        return True

    def _lost(self, fault: Fault) -> list[str]:
        """Completions that cannot go on: those of the step that failed, and who has been moved before. Of a loop that
        stalls, all: nobody knows when it ends."""
        if fault == "stalled":
            return list(self._roster.completions)
        blamed = self._steps.in_step()
        return [name for name, completion in list(self._roster.completions.items())
                if name in blamed or completion.running.moves >= MOST_MOVES or not completion.running.whole]

    def _fail(self, names: list[str], error: Callable[[], TrimtabError]) -> None:
        """End completions that no loop will end."""
        for name in names:
            completion = self._roster.open(name)
            if completion is not None:
                completion.fail(error())
            self._roster.retire(name)

    def _take_over(self) -> None:
        """What is left of the last loop goes on in this one."""
        for name, completion in list(self._roster.completions.items()):
            running = completion.running
            if running.epoch == self._epoch:
                continue
            if self._roster.open(name) is None:
                self._roster.retire(name)
                continue
            running.moves += running.epoch is not None
            running.before, running.delivered = len(running.drawn), 0
            self.enqueue(running)
