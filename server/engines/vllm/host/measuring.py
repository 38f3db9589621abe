"""Scores, captures and comparisons: teacher-forced passes through the serving engine, and what is read from them."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import numpy as np
import torch

from server.engines.adapters import Adapter
from server.engines.checks import length_of, positions_of
from server.engines.data import Captured, CaptureRequest, Sampling, Scores
from server.engines.scoring import scores_of
from server.engines.slots import SlotTable
from server.engines.vllm.host.connection import Connection
from server.engines.vllm.host.passes import Pass, tensor_of
from server.engines.vllm.host.taken import Asking, Taken
from server.engines.vllm.wire import extra_of
from steering.acting import containment
from steering.acting.containment import StepLimit, fault_error, model_error
from steering.language.errors import EngineUnavailable, ProgramLost, TrimtabError
from steering.programs.program import Program


class Measuring:
    """One measurement at a time, in slots of its own."""

    def __init__(self, connection: Connection, slots: SlotTable, last_layer: int, asking: Asking, limit: StepLimit
                 ) -> None:
        self._connection, self._slots, self._last_layer = connection, slots, last_layer
        self._asking, self._limit = asking, limit
        self._lock = asyncio.Lock()

    async def score(self, token_ids: Sequence[int], program: Program | None, prompt_length: int | None,
                    roles: Sequence[str] | None, full: bool, top: int | None, adapter: Adapter | None) -> Scores:
        given = Pass(token_ids, len(token_ids) if prompt_length is None else prompt_length, program, roles,
                     keep_from=0, adapter=adapter)
        async with self.alone([given]):
            await self.run(given, self._slots)
            parts, everything = await self._connection.first_answer("trimtab_scores", given.tag, list(token_ids), full,
                                                                    top)
        count = len(token_ids)
        return scores_of([[tensor_of(part).reshape(count, -1) for part in parts]],
                         tensor_of(everything).reshape(count, -1) if full else None)

    async def next_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None, adapter: Adapter | None
                            ) -> torch.Tensor:
        passes = [Pass(ids, len(ids), program, None, keep_from=len(ids) - 1, adapter=adapter) for ids in texts]
        async with self.alone(passes):
            await self.run_all(passes)
            found = await self._connection.first_answer("trimtab_next", [given.tag for given in passes])
        return tensor_of(found).reshape(len(texts), -1)

    async def capture(self, requests: Sequence[CaptureRequest], program: Program | None) -> list[Captured]:
        wanted = [positions_of(request) for request in requests]
        passes = [Pass(request.token_ids, length_of(request), program, request.roles,
                       capture=tuple((site, layer) for site, layers in request.sites.items() for layer in layers),
                       positions=tuple(sorted(set(positions))), adapter=request.adapter)
                  for request, positions in zip(requests, wanted, strict=True)]
        async with self.alone(passes):
            await self.run_all(passes)
            return [await self._captured(given, positions)
                    for given, positions in zip(passes, wanted, strict=True)]

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
                await self.run(Pass(given.token_ids, given.prompt_length, program, given.roles, adapter=given.adapter),
                               self._slots)
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
                await self.run(Pass(given.token_ids[:fault.position + 1], given.prompt_length, None, None,
                                    adapter=given.adapter), self._slots)
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
                                               cached=cached, adapter=given.adapter)
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

    async def run_all(self, passes: Sequence[Pass]) -> None:
        """All at once. If one fails the others end before the failure is told."""
        running = [asyncio.ensure_future(self.run(given, self._slots)) for given in passes]
        try:
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    @asynccontextmanager
    async def alone(self, passes: Sequence[Pass]) -> AsyncGenerator[None]:
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

    async def _captured(self, given: Pass, positions: Sequence[int]) -> Captured:
        answers = await self._connection.rpc("trimtab_captured", given.tag)
        order = np.searchsorted(np.asarray(given.positions), np.asarray(positions))
        found: dict[Any, dict[int, torch.Tensor]] = {}
        # Ranks that share a layer hold the same activations; in a pipeline each has those of its own layers.
        for site, layer, count, content in itertools.chain.from_iterable(answers):
            found.setdefault(site, {})[layer] = tensor_of(content).reshape(count, -1)[torch.from_numpy(order)]
        return found
