"""What completions, measurements and the test at the start use of the engine: its slots and its connection to vLLM."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from server.engines.adapters import Adapter
from server.engines.data import Generation
from server.engines.grammar_work import GrammarWork
from server.engines.slots import Lease, SlotTable
from server.engines.vllm.host.comparing import Comparing
from server.engines.vllm.host.config import MEASURE_SLOTS
from server.engines.vllm.host.connection import Connection
from server.engines.vllm.host.measuring import Measuring
from server.engines.vllm.host.options import VllmOptions
from server.engines.vllm.host.passes import Pass, keeping
from server.engines.vllm.host.refusals import RESTARTING
from server.engines.vllm.host.taken import Asking, Taken
from server.engines.vllm.wire import extra_of
from server.threads import in_thread
from steering.language.errors import EngineUnavailable, TrimtabError
from steering.programs.program import Program
from steering.programs.touch import Touch


class Serving:
    """Slots for programs, and completions that run in vLLM.

    Args:
        last_layer, vocab_size: of the model.

    Attributes:
        slots: of requests. measure_slots: of passes that measure, behind those.
    """

    def __init__(self, options: VllmOptions, connection: Connection, last_layer: int, vocab_size: int) -> None:
        self.options, self.connection, self._last_layer = options, connection, last_layer
        self._vocab_size = vocab_size
        self._spelled: Callable[[int], str] | None = None
        self._spelling = asyncio.Lock()
        self.slots = SlotTable(options.slots, connection.place, max_waiting=options.slot_queue,
                               wait_s=options.slot_wait_s)
        self.measure_slots = SlotTable(MEASURE_SLOTS, connection.place, first=options.slots + 1)
        self.asking = Asking(connection)
        self.grammars = GrammarWork(options.grammar_s)
        self.measuring = Measuring(connection, self.measure_slots, last_layer, self.asking, options.step_limit)
        self.comparing = Comparing(connection, self.measuring, self.measure_slots, last_layer, options.step_limit)

    def forget_slots(self) -> None:
        """The workers are new and hold no program."""
        self.slots.clear()
        self.measure_slots.clear()
        self._spelled = None

    async def spell(self, program: Program) -> None:
        """See that the workers can tell the sections that a program's scopes name."""
        if program.sections is None or self._spelled == program.sections.spell:
            return
        async with self._spelling:
            spell, size = program.sections.spell, self._vocab_size
            if self._spelled != spell:
                await self.connection.rpc("trimtab_spell", await in_thread(lambda: list(map(spell, range(size)))))
                self._spelled = spell

    def interrupt(self) -> None:
        """vLLM has died, so those that wait for a slot need wait no longer."""
        for table in (self.slots, self.measure_slots):
            table.interrupt(EngineUnavailable("the engine stopped", fix=RESTARTING))

    async def pin(self, program: Program) -> Lease:
        """A slot for the program, waiting for one in turn if need be."""
        self.connection.check_alive()
        return await self.slots.lease(program)

    async def explain(self, program: Program | None, token_ids: Sequence[int], prompt_length: int,
                      roles: Sequence[str] | None, taken: Taken, adapter: Adapter | None) -> TrimtabError:
        """Why a completion over these tokens was ended."""
        return await self.measuring.explained(Pass(token_ids, prompt_length, program, roles, adapter=adapter), taken)

    async def run(self, generation: Generation, program: Program | None, touch: Touch | None, slot: int, name: str
                  ) -> AsyncGenerator[Any]:
        """Outputs of vLLM for one completion, which workers know under `name`."""
        extra, before = extra_of(program, touch, slot) | {"name": name}, generation.generated_ids
        if generation.keep_from is not None:
            extra |= keeping(name, generation.keep_from, self._last_layer)
        if before:
            extra["generated"] = len(before)
        sampling = replace(generation.sampling, max_tokens=generation.sampling.max_tokens - len(before),
                           min_tokens=max(generation.sampling.min_tokens - len(before), 0))
        outputs = self.connection.outputs(generation.request_id, [*generation.prompt_ids, *before], sampling, extra,
                                          guest=generation.guest, cache_salt=generation.cache_salt,
                                          adapter=generation.adapter)
        # Closed here and now: the abort must be on its way before the slot is another's.
        async with aclosing(outputs):
            async for output in outputs:
                yield output
