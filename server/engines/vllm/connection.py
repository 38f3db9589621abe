"""The connection to vLLM's processes: started, called, watched, and started again when they have died."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import structlog

from server.engines.base import Condition, Sampling
from server.engines.vllm.options import VllmOptions
from server.engines.vllm.process import start_llm
from server.engines.vllm.reading import ModelReading
from server.engines.vllm.refusals import RESTARTING, refusal
from server.engines.vllm.sampling import sampling_params
from server.engines.vllm.wire import encode_program
from steering.errors import EngineUnavailable, UnsupportedSite
from steering.program import Program

log = structlog.get_logger(__name__)
WATCH_S = 0.2
T = TypeVar("T")


class Connection:
    """vLLM's processes as the engine uses them.

    Args:
        launched: called when vLLM's processes are new, before anything else; nothing is resident in them.
        prove: awaited after that, before requests are served. What it raises counts as a failed start.
        lost: awaited when the processes have died.

    Attributes:
        described: what each rank has hooked. running: names of requests in vLLM. restarts: since the first start.
    """

    def __init__(self, options: VllmOptions, reading: ModelReading, *, launched: Callable[[], None],
                 prove: Callable[[], Awaitable[None]], lost: Callable[[], Awaitable[None]]) -> None:
        self._options, self._reading = options, reading
        self._launched, self._prove, self._lost = launched, prove, lost
        self._llm: Any = None
        self._proven = False
        self._watcher: asyncio.Task[None] | None = None
        self.running: set[str] = set()
        self.described: list[dict[str, Any]] = []
        self.restarts = 0

    @property
    def alive(self) -> bool:
        """Whether vLLM runs and its start was proven."""
        return self._proven and self._answers

    @property
    def _answers(self) -> bool:
        return self._llm is not None and not self._llm.errored

    def condition(self) -> Condition:
        if self.alive:
            return Condition(ready=True)
        return Condition(ready=False, reason="starting" if self._watcher is None else "restarting")

    def check_alive(self) -> None:
        """Raises EngineUnavailable."""
        if not self.alive:
            raise EngineUnavailable("the engine does not run", fix=RESTARTING)

    async def start(self) -> None:
        try:
            await self._launch()
        except BaseException:
            await self._shut_down()
            raise
        self._watcher = asyncio.ensure_future(self._watch())

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._llm is not None and self._llm.output_handler is not None:
            # Left alone it would report the end of its process as a failure.
            self._llm.output_handler.cancel()
            self._llm.output_processor.propagate_error(EngineUnavailable("the server stops"))
        await self._shut_down()

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method of ours on every worker."""
        self._check_answers()
        try:
            answers: list[Any] = await self._while_it_answers(self._llm.collective_rpc(method, args=args))
        except Exception as error:
            raise self._failure(error) from error
        return answers

    async def first_answer(self, method: str, *args: Any) -> Any:
        """The answer of the rank that holds the logits."""
        answers = [answer for answer in await self.rpc(method, *args) if answer is not None]
        if not answers:
            raise EngineUnavailable(f"no rank answered {method}")
        return answers[0]

    async def place(self, slot: int, program: Program) -> bool:
        """Upload a program. True if every rank's compiled graph carries it out."""
        hooked = {(site, layer) for described in self.described for site, layer in described["places"]}
        missing = sorted({key for item in program.compiled for key in item.rows} - hooked)
        if missing:
            raise UnsupportedSite(f"{missing[0][0]} of layer {missing[0][1]} is not hooked in this engine",
                                  param="steering", fix="See GET /v1/capabilities.")
        return all(await self.rpc("trimtab_place", slot, encode_program(program)))

    async def outputs(self, request_id: str, token_ids: Sequence[int], sampling: Sampling, extra: Mapping[str, Any], *,
                      measuring: bool = False) -> AsyncGenerator[Any]:
        """Outputs of vLLM for one request. measuring: it gives way to others and computes every position itself."""
        params = sampling_params(sampling, extra)
        if measuring:
            params.skip_reading_prefix_cache = True
        self._check_answers()
        self.running.add(request_id)
        # Of several replicas the first measures: it is the one that answers calls.
        outputs = self._llm.generate({"prompt_token_ids": list(token_ids)}, params, request_id,
                                     priority=int(measuring), data_parallel_rank=0 if measuring else None)
        begun = False
        try:
            async for output in outputs:
                begun = True
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            raise self._failure(error, begun=begun) from error
        finally:
            await outputs.aclose()
            self.running.discard(request_id)

    async def _while_it_answers(self, call: Awaitable[T]) -> T:
        """The result of a call to vLLM's process, which would never come if the process died meanwhile."""
        task = asyncio.ensure_future(call)
        llm = self._llm
        try:
            while not (await asyncio.wait({task}, timeout=WATCH_S))[0]:
                if self._llm is not llm or llm.errored:
                    raise EngineUnavailable("the engine stopped", fix=RESTARTING)
            return task.result()
        finally:
            task.cancel()

    async def _launch(self) -> None:
        self._launched()
        starting = asyncio.ensure_future(asyncio.to_thread(start_llm, self._options, self._reading))
        try:
            self._llm = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread cannot be stopped: what it starts is waited for, so that it can be shut down.
            await asyncio.wait({starting})
            self._llm = None if starting.exception() else starting.result()
            raise
        self.described = await self.rpc("trimtab_describe")
        await self._prove()
        self._proven = True

    async def _shut_down(self) -> None:
        self._proven = False
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)
            # Its destructor would shut it down again, at an exit where half of its modules are gone.
            llm.shutdown = lambda timeout=None: None

    async def _watch(self) -> None:
        """Start vLLM again when its process has died, waiting longer each time it fails at once."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self._answers:
                continue
            log.error("engine_died", restarts=self.restarts)
            await self._lost()
            await self._shut_down()
            back_off = self._options.back_off_s
            for attempt in itertools.count():
                await asyncio.sleep(back_off[min(attempt, len(back_off) - 1)])
                try:
                    await self._launch()
                except Exception:
                    # Whatever it was, the next attempt is all that can be done; /health/ready says 503 meanwhile.
                    log.exception("engine_restart_failed", attempt=attempt)
                    await self._shut_down()
                else:
                    break
            self.restarts += 1
            log.info("engine_restarted", restarts=self.restarts)

    def _check_answers(self) -> None:
        if not self._answers:
            raise EngineUnavailable("the engine does not run", fix=RESTARTING)

    def _failure(self, error: Exception, *, begun: bool = True) -> Exception:
        """What a failure of vLLM is to the caller. begun: see `refusal`."""
        if not self._answers or type(error).__name__ == "EngineDeadError":
            return EngineUnavailable("the engine stopped", fix=RESTARTING)
        found = refusal(error, begun=begun)
        if found is None:
            log.error("engine_failed", exc_info=error)
            found = EngineUnavailable("the engine failed on this request; the log says more")
        return found
