"""The connection to vLLM's processes. They are started, called and watched, and started again when they have died."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import structlog

from server.engines.adapters import Adapter, Adapters
from server.engines.data import Condition, Sampling, Unready
from server.engines.vllm.host.forecast import Forecast
from server.engines.vllm.host.lora import lora_request
from server.engines.vllm.host.options import VllmOptions
from server.engines.vllm.host.process import start_llm
from server.engines.vllm.host.pulse import Processes, Pulses, end_starting
from server.engines.vllm.host.reading import ModelReading
from server.engines.vllm.host.refusals import RESTARTING, refusal
from server.engines.vllm.host.sampling import sampling_params
from server.engines.vllm.wire import GUEST, encode_program, name_of
from server.threads import contained
from steering.language.errors import EngineUnavailable, ProgramLost, UnsupportedSite
from steering.programs.program import Program

log = structlog.get_logger(__name__)
WATCH_S = 0.2
# How long a killed process may take to be gone.
KILL_S = 30.0
T = TypeVar("T")


class Connection:
    """vLLM's processes as the engine uses them.

    Args:
        launched: called when vLLM's processes are new, before anything else; nothing is resident in them.
        prove: awaited after that, before requests are served. What it raises counts as a failed start.
        lost: awaited when the processes have died.

    Attributes:
        described: what each rank has hooked. running: names of requests in vLLM. restarts: since the first start, by
        what was wrong.
    """

    def __init__(self, options: VllmOptions, reading: ModelReading, adapters: Adapters, *, launched: Callable[[], None],
                 prove: Callable[[], Awaitable[None]], lost: Callable[[], Awaitable[None]]) -> None:
        self._options, self._reading, self.adapters = options, reading, adapters
        self._launched, self._prove, self._lost = launched, prove, lost
        self._llm: Any = None
        self._pulses = Pulses()
        self._processes: Processes | None = None
        self._proven = False
        self._stalled_since: float | None = None
        self._forecast = Forecast(options.back_off_s, options.restart_limit)
        self._watcher: asyncio.Task[None] | None = None
        self.running: set[str] = set()
        self.described: list[dict[str, Any]] = []
        self.restarts: Counter[Unready] = Counter()

    @property
    def alive(self) -> bool:
        """Whether vLLM runs, its start was proven and it makes progress."""
        return self._proven and self._answers and self._stalled_since is None

    @property
    def _answers(self) -> bool:
        return self._llm is not None and not self._llm.errored

    def condition(self) -> Condition:
        if self.alive:
            return Condition(ready=True)
        if self._stalled_since is not None and not (self._forecast.hung or self._forecast.stopped):
            left = self._stalled_since + self._options.stall_s - time.monotonic()
            return Condition(ready=False, reason="stalled", retry_after_s=max(left, 0) + self._forecast.launch_s)
        return self._forecast.condition("starting" if self._watcher is None else "restarting")

    def check_alive(self) -> None:
        """Raises EngineUnavailable."""
        if not self.alive:
            raise self.condition().error()

    async def start(self) -> None:
        try:
            await self._launch()
        except BaseException:
            await self._shut_down()
            raise
        self._watcher = asyncio.ensure_future(self._watch())

    async def stop(self) -> None:
        self._forecast.stopped = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._llm is not None and self._llm.output_handler is not None:
            # Otherwise it would report the end of vLLM's process as a failure.
            self._llm.output_handler.cancel()
            self._llm.output_processor.propagate_error(EngineUnavailable("the server stops"))
        await self._shut_down()

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method of ours on every worker of every replica."""
        self._check_answers()
        try:
            with self._pulses.work():
                answers: list[Any] = await self._while_it_answers(self._call(method, args))
        except Exception as error:
            raise self._failure(error) from error
        self._pulses.beat()
        return answers

    async def _call(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        if len(self._pulses) == 1:
            answers: list[Any] = await self._llm.collective_rpc(method, args=args)
            return answers
        # vLLM's own call hands on what the first replica says and drops the rest.
        replicas = await self._llm.engine_core.call_utility_all_async("collective_rpc", method, None, args, None)
        return [answer for answers in replicas for answer in answers]

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
        placed = await self.rpc("trimtab_place", slot, encode_program(program))
        if any(held != name_of(program) for _, held in placed):
            raise ProgramLost("a worker holds another program than it was given", retry_after_s=1)
        return all(in_graph for in_graph, _ in placed)

    async def outputs(self, request_id: str, token_ids: Sequence[int], sampling: Sampling, extra: Mapping[str, Any], *,
                      measuring: bool = False, cached: bool = False, guest: bool = False,
                      cache_salt: str | None = None, adapter: Adapter | None = None) -> AsyncGenerator[Any]:
        """Outputs of vLLM for one request. measuring: it gives way to others, and computes every position itself unless
        `cached` lets it read prefixes from the cache. guest: it gives way to all of these (`worker/scheduling.py`)."""
        try:
            params = sampling_params(sampling, extra)
        except Exception as error:
            raise self._failure(error, begun=False) from error
        if measuring:
            params.skip_reading_prefix_cache = not cached
        self._check_answers()
        # Of several replicas the first measures, because what is compared must lie in the same workers.
        with (self._pulses.request(self._pulses.first if measuring else None) as replica,
              self.adapters.used(adapter)):
            self.running.add(request_id)
            prompt = {"prompt_token_ids": list(token_ids)} | ({} if cache_salt is None else {"cache_salt": cache_salt})
            outputs = self._llm.generate(
                prompt, params, request_id, priority=GUEST if guest else int(measuring),
                lora_request=None if adapter is None else lora_request(adapter),
                data_parallel_rank=None if len(self._pulses) == 1 else replica - self._pulses.first)
            begun = False
            try:
                while True:
                    # Work waits only while somebody asks for an output, because a slow reader is no stall of vLLM.
                    with self._pulses.work(replica):
                        output = await anext(outputs, None)
                    if output is None:
                        break
                    begun = True
                    yield output
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except Exception as error:
                raise self._failure(error, begun=begun) from error
            finally:
                await outputs.aclose()
                self.running.discard(request_id)

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method of vLLM's engine. What it raises is handed on, unless the engine is why."""
        self._check_answers()
        try:
            return await self._while_it_answers(getattr(self._llm, method)(*args))
        except Exception as error:
            if not self._answers:
                raise EngineUnavailable("the engine stopped", fix=RESTARTING) from error
            raise

    async def _while_it_answers(self, call: Awaitable[T]) -> T:
        """The result of a call to vLLM's process, or an error if it dies meanwhile and will never answer."""
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
        """
        Raises:
            EngineUnavailable: it took longer than it may. Its processes are ended.
        """
        self._forecast.begins()
        self._launched()
        try:
            async with asyncio.timeout(self._options.start_s or None) as limit:
                await self._begin()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise EngineUnavailable(
                f"vLLM did not start within {self._options.start_s:g} s", param="vllm_start_s",
                fix="Allow more time if the model is large, or see in the log above what vLLM waits for.") from error
        self._proven = True
        self._forecast.done()

    async def _begin(self) -> None:
        starting = asyncio.ensure_future(asyncio.to_thread(
            contained(start_llm, EngineUnavailable), self._options, self._reading, self._pulses))
        try:
            self._llm = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread cannot be stopped, but it ends with the processes that it waits for.
            while not starting.done():
                end_starting()
                await asyncio.wait({starting}, timeout=WATCH_S)
            self._llm = None if starting.exception() else starting.result()
            raise
        self._processes = Processes(self._llm)
        self._pulses.reset(getattr(self._llm.engine_core, "engine_ranks_managed", (0,)))
        try:
            self.described = await self.rpc("trimtab_describe")
            await self._prove()
        except asyncio.CancelledError:
            # To be asked to end politely they would have to answer.
            self._processes.kill()
            raise

    async def _shut_down(self) -> None:
        self._proven = False
        llm, self._llm = self._llm, None
        processes, self._processes = self._processes, None
        if llm is not None:
            await asyncio.to_thread(contained(llm.shutdown, EngineUnavailable))
            # Its destructor would shut it down again while the interpreter exits and unloads its modules.
            llm.shutdown = lambda timeout=None: None
        if processes is not None:
            processes.kill()

    async def _watch(self) -> None:
        """Start vLLM again when its process has died or makes no progress, waiting longer each time that fails."""
        while True:
            await asyncio.sleep(WATCH_S)
            reason = await self._wrong()
            if reason is None:
                continue
            log.error("engine_stalled" if reason == "stalled" else "engine_died", restarts=self.restarts.total())
            await self._lost()
            await self._shut_down()
            self._stalled_since = None
            for attempt in itertools.count():
                await asyncio.sleep(self._forecast.pause())
                try:
                    await self._launch()
                except Exception as error:
                    # Whatever the cause is, only another attempt can help; /health/ready says 503 meanwhile.
                    self._forecast.failed()
                    log.error("engine_restart_failed", attempt=attempt, error=str(error))
                    await self._shut_down()
                else:
                    break
            self.restarts[reason] += 1
            log.info("engine_restarted", restarts=self.restarts.total(), reason=reason)

    async def _wrong(self) -> Literal["restarting", "stalled"] | None:
        """Why vLLM has to be started again, if it has to. One that has stalled for too long is ended first."""
        if not self._answers or self._processes is None:
            return "restarting"
        now, silent = time.monotonic(), self._pulses.silent_s
        if self._processes.stopped:
            # A stopped process does nothing, whether work waits or not, until a signal lets it go on.
            self._stalled_since = min(self._stalled_since or now, now - silent)
        elif silent > self._options.stall_s:
            self._stalled_since = now - silent
        else:
            self._stalled_since = None
        if self._stalled_since is None or now - self._stalled_since <= self._options.stall_s:
            return None
        self._processes.kill()
        for _ in range(int(KILL_S / WATCH_S)):
            if not self._processes.running:
                return "stalled"
            await asyncio.sleep(WATCH_S)
        self._forecast.hung = True
        return "stalled"

    def _check_answers(self) -> None:
        if not self._answers:
            raise self.condition().error()

    def _failure(self, error: Exception, *, begun: bool = True) -> Exception:
        """What a failure of vLLM is to the caller. begun: see `refusal`."""
        if not self._answers or type(error).__name__ == "EngineDeadError":
            return EngineUnavailable("the engine stopped", fix=RESTARTING)
        found = refusal(error, begun=begun)
        if found is None:
            log.error("engine_failed", exc_info=error)
            found = EngineUnavailable("the engine failed on this request; the log says more")
        return found

