"""Outputs of the engine's thread -> tokens on the event loops of the callers."""

import asyncio

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from server.engines.base import FinishReason, Token
from server.engines.transformers.running import EngineCompletion
from server.engines.transformers.steps import Steps


class TokenRouter(OutputRouter):
    """Takes the stock router's place. One call into the event loop serves all completions of a step."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self._steps = steps
        self._delivered: dict[str, int] = {}

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        events: dict[asyncio.AbstractEventLoop, list[tuple[EngineCompletion, list[Token], str | None]]] = {}
        for output in outputs:
            completion = self._steps.completions.get(output.request_id)
            if completion is None:
                continue
            # What a completion that has been given up goes on with is no text of it.
            given_up = output.request_id in self._steps.given_up
            tokens = [] if given_up else self._new_tokens(output, completion)
            failure = (output.error or "it failed") if output.status == RequestStatus.FAILED else None
            if output.is_finished():
                self._delivered.pop(output.request_id, None)
                self._steps.retire(output.request_id)
            if given_up:
                continue
            events.setdefault(completion.loop, []).append((completion, tokens, failure))
        for loop, batch in events.items():
            # A loop that is closed has nobody left to tell.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_hand_over, batch)

    def _new_tokens(self, output: GenerationOutput, completion: EngineCompletion) -> list[Token]:
        if output.status == RequestStatus.FAILED:
            return []
        sampling = completion.running.generation.sampling
        start = self._delivered.get(output.request_id, 0)
        ids = output.generated_tokens
        self._delivered[output.request_id] = len(ids)
        tokens, resumed = [], len(completion.running.generation.generated_ids)
        for i in range(start, len(ids)):
            choice = completion.running.choices[resumed + i]
            reason: FinishReason | None = None
            if output.status == RequestStatus.FINISHED and i == len(ids) - 1:
                reason = "stop" if ids[i] in sampling.stop_token_ids and not sampling.ignore_eos else "length"
            tokens.append(Token(ids[i], choice.logprob, choice.top, reason))
        return tokens


def _hand_over(batch: list[tuple[EngineCompletion, list[Token], str | None]]) -> None:
    for completion, tokens, failure in batch:
        completion.deliver(tokens)
        if failure is not None:
            completion.fail(failure)
