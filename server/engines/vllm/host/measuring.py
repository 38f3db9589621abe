"""Scores, captures and comparisons: teacher-forced passes through the serving engine, and what is read from them."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import numpy as np
import torch

from server.engines.base import Captured, CaptureRequest, CompareRequest, Comparison, Kept, Lost, Sampling, Scores
from server.engines.checks import length_of, positions_of
from server.engines.touching import same_rows
from server.engines.vllm.host.connection import Connection
from server.engines.vllm.host.passes import Pass, divergence_of, tensor_of
from server.engines.vllm.host.slots import SlotTable
from server.engines.vllm.host.taken import Asking, Taken
from server.engines.vllm.wire import extra_of
from steering.acting import containment
from steering.acting.containment import StepLimit, fault_error, for_comparison, model_error
from steering.divergence import Divergence, ResidualShift
from steering.language.errors import EngineUnavailable, ProgramLost, TrimtabError
from steering.programs.program import Program

# Completions that are compared in the same passes.
AT_ONCE = 16
MOST_FORGOTTEN = 4096


class VllmKept(Kept):
    """What workers keep of a completion. They drop it when nobody refers to it, or sooner where they have no room."""

    def __init__(self, tag: str, forgotten: deque[str]) -> None:
        self.tag = tag
        self._forgotten = forgotten

    def __del__(self) -> None:
        self._forgotten.append(self.tag)

    @property
    def lost(self) -> Lost | None:
        return None


def _tag(request: CompareRequest) -> str:
    assert isinstance(request.kept, VllmKept)
    return request.kept.tag


def _pair(request: CompareRequest, steered: str, other: str, layer: int | None, same: int = 0
          ) -> dict[str, Any]:
    """Two passes to compare, as workers read it; see `worker.trimtab_compare`."""
    return {"steered": steered, "other": other, "first": request.prompt_length - 1,
            "token_ids": list(request.token_ids[request.prompt_length:]), "ends": list(request.end_ids),
            "residual": layer, "same": same}


class Measuring:
    """One measurement at a time, in slots of its own."""

    def __init__(self, connection: Connection, slots: SlotTable, last_layer: int, asking: Asking, limit: StepLimit
                 ) -> None:
        self._connection, self._slots, self._last_layer = connection, slots, last_layer
        self._asking, self._limit = asking, limit
        self._lock = asyncio.Lock()
        self._waiting: deque[tuple[CompareRequest, asyncio.Future[Comparison | Lost]]] = deque()
        self._neighbours: asyncio.Task[None] | None = None
        # Tags of what nobody will ask for any more. Workers have a bound of their own, so the oldest may go untold.
        self._forgotten: deque[str] = deque(maxlen=MOST_FORGOTTEN)

    async def score(self, token_ids: Sequence[int], program: Program | None, prompt_length: int | None,
                    roles: Sequence[str] | None, full: bool) -> Scores:
        given = Pass(token_ids, len(token_ids) if prompt_length is None else prompt_length, program, roles, keep_from=0)
        async with self._alone([given]):
            await self.run(given, self._slots)
            chosen, everything = await self._connection.first_answer("trimtab_scores", given.tag, list(token_ids), full)
        logprobs = torch.full((len(token_ids),), torch.nan)
        logprobs[1:] = tensor_of(chosen)[:-1]
        vocab = len(everything) // 4 // len(token_ids) if full else 0
        return Scores(logprobs, tensor_of(everything).reshape(-1, vocab) if full else None)

    async def next_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None) -> torch.Tensor:
        passes = [Pass(ids, len(ids), program, None, keep_from=len(ids) - 1) for ids in texts]
        async with self._alone(passes):
            await self._run_all(passes)
            found = await self._connection.first_answer("trimtab_next", [given.tag for given in passes])
        return tensor_of(found).reshape(len(texts), -1)

    async def capture(self, requests: Sequence[CaptureRequest], program: Program | None) -> list[Captured]:
        wanted = [positions_of(request) for request in requests]
        passes = [Pass(request.token_ids, length_of(request), program, request.roles,
                       capture=tuple((site, layer) for site, layers in request.sites.items() for layer in layers),
                       positions=tuple(sorted(set(positions))))
                  for request, positions in zip(requests, wanted, strict=True)]
        async with self._alone(passes):
            await self._run_all(passes)
            return [await self._captured(given, positions)
                    for given, positions in zip(passes, wanted, strict=True)]

    async def compare_all(self, requests: Sequence[CompareRequest]) -> list[Comparison]:
        """Neighbours under the same program run together."""
        found: list[Comparison] = []
        for _, same in itertools.groupby(requests, lambda request: request.program.digest):
            group = list(same)
            for start in range(0, len(group), AT_ONCE):
                found += await self._compared(group[start:start + AT_ONCE])
        return found

    async def _compared(self, requests: Sequence[CompareRequest]) -> list[Comparison]:
        """Comparisons of completions under one program."""
        program, layer = requests[0].program, self._last_layer
        count = len(program.compiled)
        steered = [self._half(request, program, layer) for request in requests]
        base = [self._half(request, None, layer) for request in requests]
        less = [[self._half(request, for_comparison(program.without(i), self._limit), None) for request in requests]
                for i in range(count if count > 1 else 0)]
        async with self._alone([*steered, *base, *itertools.chain.from_iterable(less)]):
            await self._run_all([*steered, *base])
            totals = await self._divergences([_pair(request, ours.tag, other.tag, layer) for request, ours, other in
                                              zip(requests, steered, base, strict=True)])
            without: list[list[Divergence]] = [[] for _ in requests]
            for others in less:
                await self._run_all(others)
                found = await self._divergences([_pair(request, ours.tag, other.tag, None) for request, ours, other in
                                                 zip(requests, steered, others, strict=True)])
                for shares, (share, _) in zip(without, found, strict=True):
                    shares.append(share)
            await self._connection.rpc("trimtab_forget", [given.tag for given in steered])
        return [Comparison(whole, tuple(shares) or (whole,) * count,
                           ResidualShift(tensor_of(shift[0]), tensor_of(shift[1])), exact=True)
                for (whole, shift), shares in zip(totals, without, strict=True)]

    async def _divergences(self, pairs: Sequence[dict[str, Any]]) -> list[tuple[Divergence, Any]]:
        """Of passes that were run, and the shift of the stream where a pair names a layer. Drops the other passes."""
        answers = await self._connection.first_answer("trimtab_compare", list(pairs), [])
        if any(isinstance(answer, str) for answer in answers):
            raise EngineUnavailable("the engine lost what it was to compare", retry_after_s=1)
        return [(divergence_of(answer), shift) for answer, shift in answers]

    # Of what was kept while a completion was generated.

    def kept_by(self, tag: str) -> "VllmKept":
        """What workers keep of a completion under `tag`, which they drop some time after nobody refers to it."""
        return VllmKept(tag, self._forgotten)

    async def compare_with_kept(self, request: CompareRequest) -> Comparison | Lost:
        """A comparison for which the steered pass is not run again, or why there is none. Requests that come while
        others are measured are measured together after that."""
        if not isinstance(request.kept, VllmKept):
            return "absent"
        found: asyncio.Future[Comparison | Lost] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, found))
        if self._neighbours is None or self._neighbours.done():
            self._neighbours = asyncio.ensure_future(self._serve_neighbours())
        return await found

    async def _serve_neighbours(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            # A task each, so that the fault of one is told to that one alone.
            passes = [asyncio.ensure_future(self._untouched(request)) for request, _ in batch]
            await asyncio.wait(passes)
            ready = []
            for (request, found), ran in zip(batch, passes, strict=True):
                error = ran.exception()
                if error is None:
                    ready.append((request, found, ran.result()))
                elif not found.done():
                    found.set_exception(error)
            try:
                await self._answer_neighbours(ready)
            except Exception as error:  # told to whoever waits
                for _, found, _ in ready:
                    if not found.done():
                        found.set_exception(error)

    async def _answer_neighbours(self, ready: Sequence[tuple[CompareRequest, "asyncio.Future[Comparison | Lost]", Pass]]
                                 ) -> None:
        """Compare the passes of `ready` with what was kept, in one call."""
        if not ready:
            return
        pairs = [self._kept_pair(request, base) for request, _, base in ready]
        forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        answers = await self._connection.first_answer("trimtab_compare", pairs, forgotten)
        for (request, found, _), answer in zip(ready, answers, strict=True):
            if found.done():
                continue
            try:
                told = await self._told(request, answer)
                if not found.done():
                    found.set_result(told)
            except TrimtabError as error:
                if not found.done():
                    found.set_exception(error)

    async def _told(self, request: CompareRequest, answer: Any) -> Comparison | Lost:
        """What is to be told of a request of which a worker gave `answer`."""
        if answer == "other":
            # A part of what was wanted came from the cache, so it is computed this time.
            base = await self._untouched(request, cached=False)
            pairs = [self._kept_pair(request, base)]
            answer = (await self._connection.first_answer("trimtab_compare", pairs, []))[0]
        if isinstance(answer, str):
            return "memory" if answer == "memory" else "incomplete"
        total, shift = divergence_of(answer[0]), answer[1]
        without = await self._without(request)
        return Comparison(total, without or (total,) * len(request.program.compiled),
                          ResidualShift(tensor_of(shift[0]), tensor_of(shift[1])), exact=True, rerun=None)

    def _kept_pair(self, request: CompareRequest, base: Pass) -> dict[str, Any]:
        return _pair(request, _tag(request), base.tag, self._last_layer, same_rows(request))

    async def _untouched(self, request: CompareRequest, *, cached: bool = True) -> Pass:
        """The pass of the untouched model over a completion, from its first touched token on, once it has run."""
        first, same = request.prompt_length - 1, same_rows(request)
        base = Pass(request.token_ids[:-1], request.prompt_length, None, request.roles, keep_from=first + same,
                    capture=(("resid_post", self._last_layer),),
                    positions=tuple(range(first + same, len(request.token_ids) - 1)))
        if first + same < len(request.token_ids) - 1:
            await self.run(base, self._slots, cached=cached)
        return base

    async def _without(self, request: CompareRequest) -> tuple[Divergence, ...]:
        """What was kept, against the spec less each of its interventions."""
        count = len(request.program.compiled)
        if count < 2:
            return ()
        less = [self._half(request, for_comparison(request.program.without(i), self._limit), None)
                for i in range(count)]
        async with self._alone(less):
            await self._run_all(less)
            return tuple(share for share, _ in await self._divergences(
                [_pair(request, _tag(request), other.tag, None) for other in less]))

    async def explained(self, given: Pass, taken: Taken) -> TrimtabError:
        """Why a request over these tokens was ended, of which the workers say `taken`.

        A request that shared a prefix with a faulty one has no fault of its own yet, so it is run again alone, which
        finds it. Where values overflowed in the layers behind the interventions, a pass without them tells whether the
        model itself is the cause.
        """
        async with self._lock:
            return await self._explained(given, taken)

    async def _explained(self, given: Pass, taken: Taken) -> TrimtabError:
        program, fault = given.program, taken.fault
        try:
            if fault is None:
                await self.run(Pass(given.token_ids, given.prompt_length, program, given.roles), self._slots)
                return EngineUnavailable("the engine gave this request up", retry_after_s=1)
            if fault.kind == "program":
                return ProgramLost("the engine's worker held another program; nothing was served under it",
                                   retry_after_s=1, fix="Try again.")
            if fault.kind == "step":
                assert program is not None
                return fault_error(program, containment.Fault(
                    fault.intervention, fault.site, fault.layer, fault.position,  # type: ignore[arg-type]
                    fault.step), self._limit)
            if program is not None and program.acting:
                await self.run(Pass(given.token_ids[:fault.position + 1], given.prompt_length, None, None), self._slots)
                strongest = taken.strongest()
                return fault_error(program, containment.Fault(
                    program.first_acting if strongest is None else strongest, None, None, fault.position, fault.step,
                    behind=True), self._limit)
        except TrimtabError as error:
            return error
        return model_error(fault.position, getattr(torch, self._connection.described[0]["dtype"]))

    async def run(self, given: Pass, slots: SlotTable, *, cached: bool = False) -> None:
        """One pass, its program in a slot of `slots`; what it keeps stays in the workers under its tag.

        Args:
            cached: it may read prefixes from the cache, and then keeps nothing of those.

        Raises:
            SteeringOverflow, SteeringLimit, ModelOverflow: as `base.Engine` says.
        """
        program = given.program if given.program is not None and given.program.acting else None
        touch, lease = None, None
        if program is not None:
            touch = given.touch(program)
            lease = await slots.lease(program)
        try:
            sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
            carried = extra_of(program, touch, 0 if lease is None else lease.slot) | given.extra
            outputs = self._connection.outputs(given.tag, given.token_ids, sampling, carried, measuring=True,
                                               cached=cached)
            ended = False
            async with aclosing(outputs):
                async for output in outputs:
                    ended = output.outputs[0].finish_reason == "error"
            taken = await self._asking.taken(given.tag) if ended or program is not None else None
            if taken is not None and (ended or taken.fault is not None):
                if taken.fault is None:
                    raise EngineUnavailable("the engine gave this pass up", retry_after_s=1)
                if taken.fault.kind == "program" and lease is not None:
                    lease.distrust()
                raise await self._explained(given, taken)
        finally:
            if lease is not None:
                lease.release()

    async def _run_all(self, passes: Sequence[Pass]) -> None:
        """All at once. If one fails the others end before the failure is told."""
        running = [asyncio.ensure_future(self.run(given, self._slots)) for given in passes]
        try:
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    @asynccontextmanager
    async def _alone(self, passes: Sequence[Pass]) -> AsyncGenerator[None]:
        """No other measurement meanwhile. If this one fails, what its passes left in the workers is dropped."""
        async with self._lock:
            # A measurement that waited here while vLLM died must not use the new one before its start is proven.
            self._connection.check_alive()
            try:
                yield
            except BaseException:
                if self._connection.alive:
                    await self._connection.rpc("trimtab_forget", [given.tag for given in passes])
                raise

    @staticmethod
    def _half(request: CompareRequest, program: Program | None, layer: int | None) -> Pass:
        """One side of a comparison, over the positions that predict generated tokens."""
        first = request.prompt_length - 1
        return Pass(request.token_ids[:-1], request.prompt_length, program, request.roles, keep_from=first,
                    capture=() if layer is None else (("resid_post", layer),),
                    positions=tuple(range(first, len(request.token_ids) - 1)))

    async def _captured(self, given: Pass, positions: Sequence[int]) -> Captured:
        answers = await self._connection.rpc("trimtab_captured", given.tag)
        order = np.searchsorted(np.asarray(given.positions), np.asarray(positions))
        found: dict[Any, dict[int, torch.Tensor]] = {}
        # Ranks that share a layer hold the same activations; in a pipeline each has those of its own layers.
        for site, layer, count, content in itertools.chain.from_iterable(answers):
            found.setdefault(site, {})[layer] = tensor_of(content).reshape(count, -1)[torch.from_numpy(order)]
        return found
