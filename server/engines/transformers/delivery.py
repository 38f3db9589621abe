"""Outputs of the engine's thread -> tokens on the event loops of the callers."""

import asyncio

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from server.engines.data import FinishReason, Token
from server.engines.transformers.handover import on_loop
from server.engines.transformers.roster import Roster
from server.engines.transformers.running import EngineCompletion, Running
from steering.language.errors import EngineUnavailable, TrimtabError

Events = list[tuple[EngineCompletion, list[Token], TrimtabError | None]]


class Delivery(OutputRouter):
    """Takes the stock router's place. One call into the event loop serves all completions of a step."""

    def __init__(self, roster: Roster) -> None:
        super().__init__()
        self._roster = roster

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        events: dict[asyncio.AbstractEventLoop, Events] = {}
        for output in outputs:
            completion = self._roster.completions.get(output.request_id)
            if completion is None:
                continue
            # What a completion goes on with that was given up, or that nobody reads, is no text of it.
            read = self._roster.open(output.request_id) is not None
            tokens, error = [], None
            if output.status == RequestStatus.FAILED:
                error = EngineUnavailable(f"the engine gave this request up: {output.error or 'it failed'}")
            elif read:
                tokens = _new_tokens(output, completion.running)
            if output.is_finished():
                self._roster.retire(output.request_id)
            if read:
                events.setdefault(completion.loop, []).append((completion, tokens, error))
        for loop, batch in events.items():
            on_loop(loop, _hand_over, batch)


def _new_tokens(output: GenerationOutput, running: Running) -> list[Token]:
    sampling, ids = running.generation.sampling, output.generated_tokens
    start, running.delivered = running.delivered, len(ids)
    tokens = []
    for i in range(start, len(ids)):
        drawn = running.drawn[running.before + i]
        reason: FinishReason | None = None
        if output.status == RequestStatus.FINISHED and i == len(ids) - 1:
            reason = "stop" if ids[i] in sampling.stop_token_ids and not sampling.ignore_eos else "length"
        tokens.append(Token(ids[i], drawn.logprob, drawn.top, reason))
    return tokens


def _hand_over(batch: Events) -> None:
    for completion, tokens, error in batch:
        completion.deliver(tokens)
        if error is not None:
            completion.fail(error)
