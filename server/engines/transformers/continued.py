"""Scores of tokens that are there already, from steps of the batching loop.

A text is a completion of which all tokens but the last are given. So texts under many programs share a step, what the
cache of prefixes holds of a text is not run again, and logits are made where they are asked for.
"""

import secrets
from collections.abc import Callable, Sequence

import anyio
import torch
from torch import Tensor

from server.engines.data import Generation, Sampling, ScoreRequest
from server.engines.guests import Share
from server.engines.transformers.comparing import Aside
from server.engines.transformers.forward import ROWS_AT_ONCE, ForwardPass, TokenRun
from server.engines.transformers.head import Head
from server.engines.transformers.running import EngineCompletion
from server.threads import all_or_none, in_thread

# Of rows of logits `[n, vocab_size]`, what is kept. The second argument says which rows they are.
Reading = Callable[[Tensor, slice], Tensor]


class Continued:
    """`complete` starts a completion that is run for its scores alone."""

    def __init__(self, forward: ForwardPass, head: Head, aside: Aside,
                 complete: Callable[[Generation], EngineCompletion], share: Share) -> None:
        self._forward = forward
        self._head = head
        self._aside = aside
        self._complete = complete
        self._share = share
        self._guests = anyio.CapacityLimiter(1)

    async def scores(self, requests: Sequence[ScoreRequest]) -> list[Tensor]:
        """See `Engine.score_all`."""
        chosen = torch.tensor([token for one in requests for token in one.token_ids[one.start:]])

        def own(logprobs: Tensor, part: slice) -> Tensor:
            return logprobs.gather(1, chosen[part].to(logprobs.device).unsqueeze(1)).squeeze(1)

        def alone(request: ScoreRequest) -> Tensor:
            run = TokenRun(request.token_ids, request.start, request.program)
            return self._forward.score(run, full=False, top=None).logprobs[request.start:]

        return await self._read(requests, own, alone)

    async def following(self, requests: Sequence[ScoreRequest]) -> Tensor:
        """See `Engine.following`."""
        def alone(request: ScoreRequest) -> Tensor:
            return self._forward.next_logprobs([TokenRun(request.token_ids, request.start, request.program)])

        return torch.cat(await self._read(requests, lambda logprobs, part: logprobs, alone))

    async def _read(self, requests: Sequence[ScoreRequest], reading: Reading, alone: Callable[[ScoreRequest], Tensor]
                    ) -> list[Tensor]:
        """What is read of each text; from a pass of its own where its rows could not be kept."""
        hidden = await all_or_none([self._hidden(one) for one in requests])
        counts = [_count(one) for one in requests]
        guest = all(one.guest for one in requests)
        # Over the whole vocabulary, so in a thread: the event loop serves everybody. That of guests counts as a step.
        began = self._share.clock()
        rows = await in_thread(self._rows, hidden, counts, reading, limiter=self._guests if guest else None)
        if guest:
            self._share.took(self._share.clock() - began, 0)
        found = list(rows.split(counts))
        for n, (request, kept) in enumerate(zip(requests, hidden, strict=True)):
            if kept is None:
                found[n] = await self._aside(lambda request=request: alone(request))  # type: ignore[misc]
        return found

    async def _hidden(self, request: ScoreRequest) -> Tensor | None:
        """Final hidden states where the scored tokens are predicted, `[count, d_model]`; None where they were lost."""
        start, count = request.start, _count(request)
        given = request.token_ids[start:-1]
        completion = self._complete(Generation(
            f"scored-{secrets.token_hex(12)}", request.token_ids[:start],
            Sampling(max_tokens=len(given) + 1, temperature=0.0, ignore_eos=True), request.program, generated_ids=given,
            keep_from=start - 1, guest=request.guest))
        async for _ in completion:
            pass
        kept = completion.kept()
        rows = None if kept is None else kept.rows(count)
        return None if rows is None else rows[0]

    def _rows(self, hidden: Sequence[Tensor | None], counts: Sequence[int], reading: Reading) -> Tensor:
        """What is read of the rows of all texts, on the CPU; of those that were lost it means nothing."""
        there = next((kept for kept in hidden if kept is not None), None)
        if there is None:
            return torch.empty(sum(counts), 0)
        whole = torch.cat([there[:1].expand(count, -1) if kept is None else kept
                           for kept, count in zip(hidden, counts, strict=True)])
        parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(whole), ROWS_AT_ONCE)]
        return torch.cat([reading(self._head.logits(whole[part]).float().log_softmax(dim=-1), part).cpu()
                          for part in parts])


def _count(request: ScoreRequest) -> int:
    return max(len(request.token_ids) - request.start, 1)
