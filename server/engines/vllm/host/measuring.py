"""Scores, captures and comparisons: teacher-forced passes through the serving engine, and what is read from them."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import numpy as np
import torch

from server.engines.base import Captured, CaptureRequest, CompareRequest, Comparison, Sampling, Scores
from server.engines.checks import length_of, positions_of
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


class Measuring:
    """One measurement at a time, in slots of its own."""

    def __init__(self, connection: Connection, slots: SlotTable, last_layer: int, asking: Asking, limit: StepLimit
                 ) -> None:
        self._connection, self._slots, self._last_layer = connection, slots, last_layer
        self._asking, self._limit = asking, limit
        self._lock = asyncio.Lock()

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
            totals = [await self._divergence(*halves, layer)
                      for halves in zip(requests, steered, base, strict=True)]
            without: list[list[Divergence]] = [[] for _ in requests]
            for others in less:
                await self._run_all(others)
                for shares, request, ours, other in zip(without, requests, steered, others, strict=True):
                    shares.append((await self._divergence(request, ours, other, None))[0])
            await self._connection.rpc("trimtab_forget", [given.tag for given in steered])
        return [Comparison(whole, tuple(shares) or (whole,) * count,
                           ResidualShift(tensor_of(shift[0]), tensor_of(shift[1])), exact=True)
                for (whole, shift), shares in zip(totals, without, strict=True)]

    async def _divergence(self, request: CompareRequest, steered: Pass, other: Pass, layer: int | None
                          ) -> tuple[Divergence, Any]:
        """Of two passes that were run, and the shift of the stream if `layer` names one. Drops the second."""
        generated = list(request.token_ids[request.prompt_length:])
        answer, shift = await self._connection.first_answer("trimtab_compare", steered.tag, other.tag, generated, layer,
                                                            list(request.end_ids))
        return divergence_of(answer), shift

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

    async def run(self, given: Pass, slots: SlotTable) -> None:
        """One pass, its program in a slot of `slots`; what it keeps stays in the workers under its tag.

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
            outputs = self._connection.outputs(given.tag, given.token_ids, sampling, carried, measuring=True)
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
