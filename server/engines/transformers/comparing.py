"""How far a completion is from the untouched model's, measured on rows that were kept while it ran or by passes that
are run for it."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Protocol, TypeVar

import anyio

from server.engines.data import CompareRequest, Comparison, Generation, Lost, Sampling
from server.engines.guests import Share
from server.engines.keeping import KeptRows
from server.engines.touching import same_rows
from server.engines.transformers.forward import ForwardPass, GeneratedPass, compared, padded_passes
from server.engines.transformers.head import Head, Rows
from server.engines.transformers.running import EngineCompletion
from server.threads import all_or_none, in_thread
from steering.acting.containment import StepLimit, for_comparison
from steering.divergence import Divergence, ResidualShift, residual_shift
from steering.language.errors import EngineFailed

T = TypeVar("T")
# Completions that are compared in the same steps.
AT_ONCE = 16


class Aside(Protocol):
    """Runs work in a thread while no step is taken."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


class Comparing:
    """Comparisons of completions; `complete` starts one that is run for a comparison alone."""

    def __init__(self, forward: ForwardPass, head: Head, limit: StepLimit, aside: Aside,
                 complete: Callable[[Generation], EngineCompletion], share: Share) -> None:
        self._forward = forward
        self._head = head
        self._limit = limit
        self._aside = aside
        self._complete = complete
        self._share = share
        self._guests = anyio.CapacityLimiter(1)

    async def one(self, request: CompareRequest) -> Comparison:
        """Of one completion, from what was kept of it where that suffices."""
        found = await self._with_kept(request)
        if isinstance(found, Comparison):
            return found
        return replace((await self._run_again([request]))[0], rerun=found)

    async def all(self, requests: Sequence[CompareRequest]) -> list[Comparison]:
        """Of many, in their order. Those of which enough was kept share steps of the batching loop; of the others
        neighbours under the same program share their passes."""
        few = asyncio.Semaphore(AT_ONCE)

        async def one(request: CompareRequest) -> Comparison | Lost:
            async with few:
                return await self._with_kept(request)

        tried = await all_or_none([one(request) for request in requests])
        found = {n: comparison for n, comparison in enumerate(tried) if isinstance(comparison, Comparison)}
        lost = {n: why for n, why in enumerate(tried) if not isinstance(why, Comparison)}
        for _, same in groupby(lost, lambda n: requests[n].program.digest):
            group = list(same)
            for chosen in padded_passes([len(requests[n].token_ids) for n in group]):
                members = [group[i] for i in chosen]
                again = await self._run_again([requests[n] for n in members])
                found |= {n: replace(comparison, rerun=lost[n]) for n, comparison in zip(members, again, strict=True)}
        return [found[n] for n in range(len(requests))]

    async def _with_kept(self, request: CompareRequest) -> Comparison | Lost:
        """A comparison for which the steered pass is not run again, or why there is none.

        The untouched pass is a request of the batching loop, so that it shares steps with its neighbours and begins
        where the cache of untouched prefixes ends.
        """
        count = len(request.token_ids) - request.prompt_length
        if not isinstance(request.kept, KeptRows):
            return "absent"
        kept = request.kept.rows(count)
        if kept is None:
            return request.kept.lost or "incomplete"
        steered = Rows(*kept)
        same = same_rows(request)
        base = steered.upto(same)
        if same < count:
            ids = list(request.token_ids[:-1])
            completion = self._complete(Generation(
                f"measured-{secrets.token_hex(12)}", ids, Sampling(max_tokens=1, temperature=0.0, ignore_eos=True),
                keep_from=request.prompt_length - 1 + same, guest=request.guest))
            async for _ in completion:
                pass
            rest = completion.kept()
            found = None if rest is None else rest.rows(count - same)
            if found is None:
                return "incomplete" if rest is None or rest.lost is None else rest.lost
            base = base.then(Rows(*found))
        # Over the whole vocabulary, so in a thread: the event loop serves everybody. That of a guest counts as a step.
        began = self._share.clock()
        total, shift = await in_thread(self._apart, steered, base, request,
                                       limiter=self._guests if request.guest else None)
        if request.guest:
            self._share.took(self._share.clock() - began, 0)
        program, without = request.program, []
        for i in range(len(program.compiled) if len(program.compiled) > 1 else 0):
            less = for_comparison(program.without(i), self._limit)
            other = await self._aside(partial(self._forward.generated, request, less))
            without.append(await in_thread(compared, steered.logits(self._head), other.rows, request))
        return Comparison(total, tuple(without) or (total,) * len(program.compiled), shift, exact=True, rerun=None)

    def _apart(self, steered: Rows, base: Rows, request: CompareRequest) -> tuple[Divergence, ResidualShift]:
        shift = residual_shift(steered.residual.float(), base.residual.float())
        return (compared(steered.logits(self._head), base.logits(self._head), request),
                ResidualShift(shift.relative.cpu(), shift.cosine.cpu()))

    async def _run_again(self, requests: Sequence[CompareRequest]) -> list[Comparison]:
        """Comparisons of completions under one program, in passes that hold all of them."""
        program = requests[0].program
        steered = await self._aside(partial(self._forward.generated_all, requests, program))
        base = await self._aside(partial(self._forward.generated_all, requests, None))
        # Over the whole vocabulary, so in threads: the event loop serves everybody.
        totals = await in_thread(partial(_all_compared, steered, base, requests), failure=EngineFailed)
        shifts = await in_thread(lambda: [residual_shift(s.hidden, b.hidden)
                                          for s, b in zip(steered, base, strict=True)], failure=EngineFailed)
        count = len(program.compiled)
        without: list[list[Divergence]] = [[] for _ in requests]
        for i in range(count if count > 1 else 0):
            less = for_comparison(program.without(i), self._limit)
            others = await self._aside(partial(self._forward.generated_all, requests, less))
            shares_now = await in_thread(partial(_all_compared, steered, others, requests), failure=EngineFailed)
            for shares, found in zip(without, shares_now, strict=True):
                shares.append(found)
        return [Comparison(total, tuple(shares) or (total,) * count,
                           ResidualShift(shift.relative.cpu(), shift.cosine.cpu()), exact=True)
                for total, shares, shift in zip(totals, without, shifts, strict=True)]


def _all_compared(steered: Sequence[GeneratedPass], others: Sequence[GeneratedPass], requests: Sequence[CompareRequest]
                  ) -> list[Divergence]:
    return [compared(s.rows, o.rows, r) for s, o, r in zip(steered, others, requests, strict=True)]
