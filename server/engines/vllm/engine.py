"""The production engine: stock vLLM, compiled, with a program per request."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import structlog
import torch
from prometheus_client import REGISTRY, generate_latest

from server.effects.divergence import Divergence, ResidualShift
from server.engines.base import (
    Captured,
    CaptureRequest,
    CompareRequest,
    Comparison,
    Engine,
    Generation,
    Sampling,
    Scores,
)
from server.engines.checks import check_capture, check_compare, check_room, check_tokens, length_of, positions_of
from server.engines.vllm.arguments import check_arguments
from server.engines.vllm.completion import VllmCompletion
from server.engines.vllm.options import VllmOptions
from server.engines.vllm.passes import Pass, divergence_of, tensor_of
from server.engines.vllm.process import MEASURE_SLOTS, context_of, start_llm
from server.engines.vllm.reading import ModelReading, engine_dtype, read_model
from server.engines.vllm.sampling import sampling_params
from server.engines.vllm.selftest import run_selftest
from server.engines.vllm.slots import SlotTable
from server.engines.vllm.wire import encode_program, encode_touch
from steering.errors import EngineUnavailable, InvalidRequest, SlotsExhausted, TrimtabError, UnsupportedSite
from steering.facts import ModelFacts
from steering.ops import operations
from steering.program import Program
from steering.scope import TouchMap

log = structlog.get_logger(__name__)
WATCH_S = 0.2
RESTARTING = "It is being restarted; try again in a while."
T = TypeVar("T")


class VllmEngine(Engine):
    """vLLM in processes of its own. See `base.Engine` for the contract."""

    features = frozenset({"structured_outputs"})

    def __init__(self, options: VllmOptions) -> None:
        check_arguments(options.extra)
        self.options = options
        self.reading: ModelReading = read_model(options)
        self.facts: ModelFacts = self.reading.facts
        self.end_ids = self.reading.end_ids
        self.slots = SlotTable(options.slots, self._place)
        self._measure = SlotTable(MEASURE_SLOTS, self._place, first=options.slots + 1)
        self._measure_lock = asyncio.Lock()
        self._llm: Any = None
        self._names = itertools.count()
        self._running: set[str] = set()
        self._waiting = 0
        self._freed = asyncio.Condition()
        self._watcher: asyncio.Task[None] | None = None
        # What each rank has hooked.
        self.described: list[dict[str, Any]] = []
        self._restarts = 0

    async def start(self) -> None:
        await self._launch()
        if self.options.self_test:
            try:
                self.facts = await run_selftest(self)
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

    def generate(self, generation: Generation) -> VllmCompletion:
        self._check_alive()
        check_tokens(generation.prompt_ids, self.facts)
        check_room(generation, context_of(self.options, self.reading))
        if generation.request_id in self._running:
            raise InvalidRequest(f"request id {generation.request_id} is in use", param="request_id")
        return VllmCompletion(self, generation)

    async def score(self, token_ids: Sequence[int], program: Program | None = None, *, prompt_length: int | None = None,
                    roles: Sequence[str] | None = None, full: bool = False) -> Scores:
        check_tokens(token_ids, self.facts)
        given = Pass(token_ids, len(token_ids) if prompt_length is None else prompt_length, program, roles, keep_from=0)
        async with self._measure_lock, self._forgotten([given]):
            await self.run_pass(given, self._measure)
            chosen, everything = await self._first_answer("trimtab_scores", given.tag, list(token_ids), full)
        logprobs = torch.full((len(token_ids),), torch.nan)
        logprobs[1:] = tensor_of(chosen)[:-1]
        vocab = len(everything) // 4 // len(token_ids) if full else 0
        return Scores(logprobs, tensor_of(everything).reshape(-1, vocab) if full else None)

    async def next_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None = None) -> torch.Tensor:
        for token_ids in texts:
            check_tokens(token_ids, self.facts)
        passes = [Pass(ids, len(ids), program, None, keep_from=len(ids) - 1) for ids in texts]
        async with self._measure_lock, self._forgotten(passes):
            await asyncio.gather(*(self.run_pass(given, self._measure) for given in passes))
            found = tensor_of(await self._first_answer("trimtab_next", [given.tag for given in passes]))
        return found.reshape(len(texts), -1)

    async def capture(self, requests: Sequence[CaptureRequest], program: Program | None = None) -> list[Captured]:
        for request in requests:
            check_capture(request, self.facts)
        wanted = [positions_of(request) for request in requests]
        passes = [Pass(request.token_ids, length_of(request), program, request.roles,
                       capture=tuple((site, layer) for site, layers in request.sites.items() for layer in layers),
                       positions=tuple(sorted(set(positions))))
                  for request, positions in zip(requests, wanted, strict=True)]
        async with self._measure_lock, self._forgotten(passes):
            await asyncio.gather(*(self.run_pass(given, self._measure) for given in passes))
            return [await self._captured(given, positions)
                    for given, positions in zip(passes, wanted, strict=True)]

    async def compare(self, request: CompareRequest) -> Comparison:
        check_compare(request, self.facts)
        layer = self.facts.num_layers - 1
        generated = list(request.token_ids[request.prompt_length:])
        async with self._measure_lock:
            passes: list[Pass] = []
            async with self._forgotten(passes):
                steered = await self._compared_pass(request, request.program, layer, passes)
                base = await self._compared_pass(request, None, layer, passes)
                total, shift = await self._first_answer("trimtab_compare", steered.tag, base.tag, generated, layer,
                                                         list(request.end_ids))
                without = []
                count = len(request.program.compiled)
                for i in range(count if count > 1 else 0):
                    other = await self._compared_pass(request, request.program.without(i), None, passes)
                    answer, _ = await self._first_answer("trimtab_compare", steered.tag, other.tag, generated, None,
                                                         list(request.end_ids))
                    without.append(divergence_of(answer))
            await self.rpc("trimtab_forget", [steered.tag])
        whole: Divergence = divergence_of(total)
        return Comparison(whole, tuple(without) or (whole,) * count,
                          ResidualShift(tensor_of(shift[0]), tensor_of(shift[1])), exact=True)

    def capabilities(self) -> dict[str, Any]:
        in_graph = {site for described in self.described for site, _ in described["graph"]}
        sites = {site: {"layers": list(layers), "width": self.facts.width(site), "in_graph": site in in_graph,
                        "ops": [op.name for op in operations() if site in op.sites]}
                 for site, layers in self.facts.sites.items()}
        return {"engine": "vllm", "model": self.facts.model_id, "family": self.facts.family,
                "fingerprint": self.facts.fingerprint, "num_layers": self.facts.num_layers,
                "d_model": self.facts.d_model, "num_experts": self.facts.num_experts,
                "device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": engine_dtype(self.options),
                "compiled": not self.options.eager, "self_test": self.options.self_test, "sites": sites}

    def stats(self) -> dict[str, float]:
        return {"running": len(self._running), "waiting": self._waiting, "slots_total": self.slots.num_slots,
                "slots_used": self.slots.num_pinned, "slots_resident": self.slots.num_resident,
                "bank_bytes": float(sum(described["bytes"] for described in self.described)),
                "restarts": self._restarts,
                "kv_blocks_total": max(2, -(-self.options.kv_cache_tokens // self.options.block_size))}

    def metrics(self) -> bytes:
        """vLLM's own metrics, which it keeps in the process-wide registry."""
        names = [name for name in REGISTRY._names_to_collectors if name.startswith("vllm:")]
        return generate_latest(REGISTRY.restricted_registry(names)) if names else b""

    @property
    def alive(self) -> bool:
        return self._llm is not None and not self._llm.errored

    # Used by completions.

    async def pin(self, program: Program) -> int:
        """A slot for the program, waiting for one if need be."""
        self._waiting += 1
        try:
            async with asyncio.timeout(self.options.slot_wait_s), self._freed:
                while True:
                    self._check_alive()
                    resident = self.slots.reserve(program)
                    if resident is not None:
                        break
                    await self._freed.wait()
        except TimeoutError:
            raise SlotsExhausted(f"all {self.options.slots} slots were in use for {self.options.slot_wait_s:g} s",
                                 fix="Send fewer distinct specs at a time, or start with more slots.") from None
        finally:
            self._waiting -= 1
        # Outside of the time limit and the lock: an upload is no waiting for others.
        return await self.slots.settled(program, resident)

    def unpin(self, program: Program, epoch: int) -> None:
        self.slots.release(program, epoch)
        asyncio.ensure_future(self._wake())

    async def run(self, generation: Generation, program: Program | None, touch: TouchMap | None, slot: int,
                  ) -> AsyncGenerator[Any]:
        """Outputs of vLLM for one completion."""
        extra = _extra(program, touch, slot)
        outputs = self._outputs(generation.request_id, generation.prompt_ids, generation.sampling, extra, 0)
        # Closed here and now: the abort must be on its way before the slot is another's.
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    # Used by the self-test.

    async def run_pass(self, given: Pass, table: SlotTable) -> None:
        """One teacher-forced pass, its program in a slot of `table`; results stay in the workers under its tag."""
        program = given.program if given.program is not None and given.program.acting else None
        touch, slot, epoch = None, 0, table.epoch
        if program is not None:
            touch = given.touch(program)
            found = await table.acquire(program)
            if found is None:
                raise SlotsExhausted("no slot is left for measuring")
            slot = found
        try:
            extra = _extra(program, touch, slot) | given.extra
            sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
            async with aclosing(self._outputs(given.tag, given.token_ids, sampling, extra, 1, fresh=True)) as outputs:
                async for _ in outputs:
                    pass
        finally:
            if program is not None:
                table.release(program, epoch)

    async def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method of ours on every worker."""
        self._check_alive()
        try:
            answers: list[Any] = await self._while_alive(self._llm.collective_rpc(method, args=args))
        except Exception as error:
            raise self._failure(error) from error
        return answers

    # Parts.

    @asynccontextmanager
    async def _forgotten(self, passes: Sequence[Pass]) -> AsyncGenerator[None]:
        """If what is done with the passes fails, what they left in the workers is dropped."""
        try:
            yield
        except BaseException:
            if self.alive:
                await self.rpc("trimtab_forget", [given.tag for given in passes])
            raise

    async def _outputs(self, request_id: str, token_ids: Sequence[int], sampling: Sampling, extra: Mapping[str, Any],
                       priority: int, fresh: bool = False) -> AsyncGenerator[Any]:
        params = sampling_params(sampling, extra)
        if fresh:
            # Of several replicas the first measures: it is the one that answers calls.
            params.skip_reading_prefix_cache = True
        self._check_alive()
        self._running.add(request_id)
        outputs = self._llm.generate({"prompt_token_ids": list(token_ids)}, params, request_id, priority=priority,
                                     data_parallel_rank=0 if fresh else None)
        try:
            async for output in outputs:
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            raise self._failure(error) from error
        finally:
            await outputs.aclose()
            self._running.discard(request_id)

    async def _compared_pass(self, request: CompareRequest, program: Program | None, layer: int | None,
                             passes: list[Pass]) -> Pass:
        first = request.prompt_length - 1
        given = Pass(request.token_ids[:-1], request.prompt_length, program, request.roles, keep_from=first,
                     capture=() if layer is None else (("resid_post", layer),),
                     positions=tuple(range(first, len(request.token_ids) - 1)))
        passes.append(given)
        await self.run_pass(given, self._measure)
        return given

    async def _captured(self, given: Pass, positions: Sequence[int]) -> Captured:
        answers = await self.rpc("trimtab_captured", given.tag)
        order = np.searchsorted(np.asarray(given.positions), np.asarray(positions))
        found: dict[Any, dict[int, torch.Tensor]] = {}
        # Ranks that share a layer hold the same activations; in a pipeline each has those of its own layers.
        for site, layer, count, content in itertools.chain.from_iterable(answers):
            found.setdefault(site, {})[layer] = tensor_of(content).reshape(count, -1)[torch.from_numpy(order)]
        return found

    async def _first_answer(self, method: str, *args: Any) -> Any:
        """The answer of the rank that holds the logits."""
        answers = [answer for answer in await self.rpc(method, *args) if answer is not None]
        if not answers:
            raise EngineUnavailable(f"no rank answered {method}")
        return answers[0]

    async def _while_alive(self, call: Awaitable[T]) -> T:
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

    async def _place(self, slot: int, program: Program) -> bool:
        hooked = {(site, layer) for described in self.described for site, layer in described["places"]}
        missing = sorted({key for item in program.compiled for key in item.rows} - hooked)
        if missing:
            raise UnsupportedSite(f"{missing[0][0]} of layer {missing[0][1]} is not hooked in this engine",
                                  param="steering", fix="See GET /v1/capabilities.")
        return all(await self.rpc("trimtab_place", slot, encode_program(program)))

    async def _wake(self) -> None:
        async with self._freed:
            self._freed.notify_all()

    async def _launch(self) -> None:
        self.slots.clear()
        self._measure.clear()
        starting = asyncio.ensure_future(asyncio.to_thread(start_llm, self.options, self.reading))
        try:
            self._llm = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread cannot be stopped: what it starts is waited for, so that it can be shut down.
            await asyncio.wait({starting})
            self._llm = None if starting.exception() else starting.result()
            raise
        self.described = await self.rpc("trimtab_describe")

    async def _shut_down(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)
            # Its destructor would shut it down again, at an exit where half of its modules are gone.
            llm.shutdown = lambda timeout=None: None

    async def _watch(self) -> None:
        """Start vLLM again when its process has died, waiting longer each time it fails at once."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self._llm is not None and not self._llm.errored:
                continue
            log.error("engine_died", restarts=self._restarts)
            # Those that wait for a slot hear of it now.
            await self._wake()
            await self._shut_down()
            back_off = self.options.back_off_s
            for attempt in itertools.count():
                await asyncio.sleep(back_off[min(attempt, len(back_off) - 1)])
                try:
                    await self._launch()
                except Exception:
                    # Whatever it was, the next attempt is all that can be done; /health says 503 meanwhile.
                    log.exception("engine_restart_failed", attempt=attempt)
                    await self._shut_down()
                else:
                    break
            self._restarts += 1
            log.info("engine_restarted", restarts=self._restarts)

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineUnavailable("the engine does not run", fix=RESTARTING)

    def _failure(self, error: Exception) -> Exception:
        """What a failure of vLLM is to the caller."""
        if isinstance(error, TrimtabError):
            return error
        if not self.alive or type(error).__name__ == "EngineDeadError":
            return EngineUnavailable("the engine stopped", fix=RESTARTING)
        if isinstance(error, ValueError):
            return InvalidRequest(str(error))
        return EngineUnavailable(f"the engine failed: {error}")


def _extra(program: Program | None, touch: TouchMap | None, slot: int) -> dict[str, Any]:
    if program is None or touch is None:
        return {}
    return {"slot": slot, "digest": program.digest, "touch": encode_touch(touch, program.rules, program.acting)}


