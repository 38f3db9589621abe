"""Comparisons of completions: of what workers kept while a completion was generated with a pass of the untouched model,
or of two passes where nothing was kept."""

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

from server.engines.data import CompareRequest, Comparison, Kept, Lost
from server.engines.slots import SlotTable
from server.engines.touching import same_rows
from server.engines.vllm.host.connection import Connection
from server.engines.vllm.host.measuring import Measuring
from server.engines.vllm.host.passes import Pass, divergence_of, tensor_of
from steering.acting.containment import StepLimit, for_comparison
from steering.divergence import Divergence, ResidualShift
from steering.language.errors import EngineUnavailable, TrimtabError
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


class Comparing:
    """Compares by passes of `measuring`, with programs in `slots`."""

    def __init__(self, connection: Connection, measuring: Measuring, slots: SlotTable, last_layer: int, limit: StepLimit
                 ) -> None:
        self._connection, self._measuring, self._slots = connection, measuring, slots
        self._last_layer, self._limit = last_layer, limit
        self._waiting: deque[tuple[CompareRequest, asyncio.Future[Comparison | Lost]]] = deque()
        self._neighbours: asyncio.Task[None] | None = None
        # Tags of what nobody will ask for any more. Workers have a bound of their own, so the oldest may go untold.
        self._forgotten: deque[str] = deque(maxlen=MOST_FORGOTTEN)

    async def all(self, requests: Sequence[CompareRequest]) -> list[Comparison]:
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
        async with self._measuring.alone([*steered, *base, *itertools.chain.from_iterable(less)]):
            await self._measuring.run_all([*steered, *base])
            totals = await self._divergences([_pair(request, ours.tag, other.tag, layer) for request, ours, other in
                                              zip(requests, steered, base, strict=True)])
            without: list[list[Divergence]] = [[] for _ in requests]
            for others in less:
                await self._measuring.run_all(others)
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
            raise EngineUnavailable("the engine lost the rows that it was to compare", retry_after_s=1)
        return [(divergence_of(answer), shift) for answer, shift in answers]

    # Of what was kept while a completion was generated.

    def kept_by(self, tag: str) -> VllmKept:
        """What workers keep of a completion under `tag`, which they drop some time after nobody refers to it."""
        return VllmKept(tag, self._forgotten)

    async def with_kept(self, request: CompareRequest) -> Comparison | Lost:
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
                    positions=tuple(range(first + same, len(request.token_ids) - 1)), adapter=request.adapter)
        if first + same < len(request.token_ids) - 1:
            await self._measuring.run(base, self._slots, cached=cached)
        return base

    async def _without(self, request: CompareRequest) -> tuple[Divergence, ...]:
        """What was kept, against the spec less each of its interventions."""
        count = len(request.program.compiled)
        if count < 2:
            return ()
        less = [self._half(request, for_comparison(request.program.without(i), self._limit), None)
                for i in range(count)]
        async with self._measuring.alone(less):
            await self._measuring.run_all(less)
            return tuple(share for share, _ in await self._divergences(
                [_pair(request, _tag(request), other.tag, None) for other in less]))

    @staticmethod
    def _half(request: CompareRequest, program: Program | None, layer: int | None) -> Pass:
        """One side of a comparison, over the positions that predict generated tokens."""
        first = request.prompt_length - 1
        return Pass(request.token_ids[:-1], request.prompt_length, program, request.roles, keep_from=first,
                    capture=() if layer is None else (("resid_post", layer),),
                    positions=tuple(range(first, len(request.token_ids) - 1)), adapter=request.adapter)
