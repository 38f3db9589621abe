"""A completion in vLLM: waits for a slot, hands tokens on, gives the slot back."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from server.engines.base import Completion
from server.engines.data import Generation, Kept, Token, Touched
from server.engines.grammar import check
from server.engines.slots import Lease
from server.engines.touching import count_touched
from server.engines.vllm.host.sampling import tokens_of
from server.engines.vllm.host.serving import Serving
from server.engines.vllm.host.taken import Taken
from steering.language.errors import EngineUnavailable, TrimtabError
from steering.programs.touch import Touch

# Seconds in which the workers may say what a request did that is left early.
ASK_S = 5.0


class VllmCompletion(Completion):
    """See `base.Completion`."""

    def __init__(self, serving: Serving, generation: Generation) -> None:
        program = generation.program
        self.generation = generation
        self._program = program if program is not None and program.acting else None
        self._touch: Touch | None = None
        if self._program is not None:
            self._touch = self._program.touch(generation.prompt_ids, generation.sampling.max_tokens,
                                              generation.roles)
            self._touch.settle(generation.generated_ids)
        self._serving = serving
        self._outputs: Any = None
        self._admitting: asyncio.Task[None] | None = None
        self._lease: Lease | None = None
        self._name = uuid.uuid4().hex
        self._taken: Taken | None = None
        self._token_ids: list[int] = list(generation.generated_ids)
        self._cached: int | None = None
        self._kept = None if generation.keep_from is None else serving.comparing.kept_by(self._name)
        self._over = False

    async def admit(self) -> None:
        if self._admitting is None:
            self._admitting = asyncio.ensure_future(self._admit())
        await asyncio.shield(self._admitting)

    async def _admit(self) -> None:
        grammar = self.generation.sampling.grammar
        if grammar is not None:
            await self._serving.grammars.done(grammar, check)
        if self._program is not None:
            await self._serving.spell(self._program)
            self._lease = await self._serving.pin(self._program)

    async def __aiter__(self) -> AsyncIterator[Token]:
        try:
            await self.admit()
            slot = 0 if self._lease is None else self._lease.slot
            self._outputs = self._serving.run(self.generation, self._program, self._touch, slot, self._name)
            async for output in self._outputs:
                self._cached = output.num_cached_tokens if self._cached is None else self._cached
                await self._check_finish(output.outputs[0].finish_reason)
                for token in tokens_of(output, self.generation.sampling):
                    self._token_ids.append(token.token_id)
                    if token.finish_reason is not None:
                        await self._check_taken()
                        self._over = True
                    yield token
            if not self._over:
                raise EngineUnavailable("the engine gave this request up")
        finally:
            await self.cancel()

    async def _check_finish(self, reason: str | None) -> None:
        """Raises where vLLM ended the request instead of finishing it."""
        if reason not in ("error", "abort"):
            return
        self._over = True
        if reason == "error":
            self._taken = await self._serving.asking.taken(self._name)
            grammar = self.generation.sampling.grammar
            if self._taken.fault is None and grammar is not None and not self._token_ids:
                # It passed all checks, but vLLM could not compile it for this vocabulary.
                raise grammar.refused("it cannot be compiled for this model")
            raise await self._why(self._taken)
        raise EngineUnavailable("the engine gave this request up")

    async def _check_taken(self) -> None:
        """Raises the fault of a request whose tokens have all come, if a rank found one of which vLLM's scheduler did
        not hear."""
        if self._program is None:
            return
        self._taken = await self._serving.asking.taken(self._name)
        if self._taken.fault is not None:
            self._over = True
            raise await self._why(self._taken)

    async def _why(self, taken: Taken) -> TrimtabError:
        if taken.fault is not None and taken.fault.kind == "program" and self._lease is not None:
            self._lease.distrust()
        token_ids = [*self.generation.prompt_ids, *self._token_ids]
        return await self._serving.explain(self.generation.program, token_ids, len(self.generation.prompt_ids),
                                          self.generation.roles, taken, self.generation.adapter)

    async def cancel(self) -> None:
        try:
            await self._look_back()
        finally:
            self._over = True
            if self._admitting is not None and not self._admitting.done():
                self._admitting.cancel()
            # Closing the outputs aborts the request in vLLM; only then may its slot be another's.
            outputs, self._outputs = self._outputs, None
            try:
                if outputs is not None:
                    await outputs.aclose()
            finally:
                lease, self._lease = self._lease, None
                if lease is not None:
                    lease.release()

    async def _look_back(self) -> None:
        """Ask what a request did that is left before its end, at a stop string for example, if that takes no time."""
        if self._over or self._outputs is None or self._program is None:
            return
        self._over = True
        with suppress(TrimtabError, TimeoutError):
            async with asyncio.timeout(ASK_S):
                self._taken = await self._serving.asking.taken(self._name)

    def cached(self) -> int | None:
        return None if self._cached is None else min(self._cached, len(self.generation.prompt_ids))

    def kept(self) -> Kept | None:
        return self._kept

    def touched(self) -> list[Touched]:
        # The newest token has been sampled, but the model has not read it yet.
        token_ids = [*self.generation.prompt_ids, *self._token_ids]
        begun = len(self._token_ids) > len(self.generation.generated_ids)
        processed = len(token_ids) - 1 if begun else 0
        counted = count_touched(self.generation.program, self._touch, token_ids, processed)
        return counted if self._taken is None else self._taken.add_to(counted)
