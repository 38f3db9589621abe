"""What requests that look into a text have in common: who asks, the text as tokens, a place in the queue, a program."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from fastapi import Request

from server.identity.quotas import count_tokens
from server.requests.admission.caller import caller_of
from server.requests.admission.queue import Cost
from server.requests.gates import Decided, decide
from server.requests.model_names import parse_model, serving
from server.requests.reading import Text, check_reading, length_of, prompt_to_read
from server.requests.state import ServerState
from steering.language.errors import TrimtabError
from steering.language.spec import Steering


class Body(Protocol):
    @property
    def model(self) -> str: ...

    @property
    def input(self) -> Text: ...

    @property
    def steering(self) -> Steering: ...


class Looking:
    """
    Attributes:
        state: of the server, as the model of the request has it.
        plan, prompt: known from `begin` on.
    """

    def __init__(self, body: Body, request: Request, state: ServerState) -> None:
        check_reading(body.steering)
        self._body, self._model = body, parse_model(body.model, state)
        self.state = serving(self._model, state)
        self._caller = caller_of(request, self.state.settings, None)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[None]:
        """Around what has to be known before the request can wait for the engine."""
        state, body = self.state, self._body
        with state.queue.entering(self._caller.client):
            self.plan = await state.pools.complete(lambda: state.planner.plan(body.steering, self._model.preset))
            self.prompt = await state.texts.run(lambda: prompt_to_read(body.input, self.plan, state, ("input",)),
                                                length_of(body.input))
            yield

    @asynccontextmanager
    async def run(self, tokens: int) -> AsyncIterator[Decided]:
        """Around the passes, which read so many tokens. What goes wrong in them is told of the field it is about."""
        self.plan.check_prompt(self.prompt.token_ids, self.prompt.roles)
        cost = Cost(tokens, 0)
        await count_tokens(cost.tokens)
        with self.state.queue.joined(self._caller.client, [cost]) as [place]:
            async with self._caller.deadline.held(), place:
                try:
                    decided = (await decide(self.plan, [self.prompt], self.state.engine))[0]
                    yield decided
                except TrimtabError as error:
                    raise self.plan.placed(error) from None
