"""The production engine: stock vLLM, compiled, with a program per request."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import torch
from prometheus_client import REGISTRY, generate_latest

from server.engines.base import (
    Captured,
    CaptureRequest,
    CompareRequest,
    Comparison,
    Condition,
    Engine,
    Generation,
    Scores,
    Unready,
)
from server.engines.checks import check_capture, check_compare, check_room, check_tokens
from server.engines.vllm.completion import VllmCompletion
from server.engines.vllm.config import MEASURE_SLOTS, awake, check_names, context_of, engine_config, quiet
from server.engines.vllm.connection import Connection
from server.engines.vllm.fuse import STAGE_OPS
from server.engines.vllm.measuring import Measuring
from server.engines.vllm.options import VllmOptions
from server.engines.vllm.passes import Pass
from server.engines.vllm.reading import ModelReading, engine_dtype, read_model
from server.engines.vllm.refusals import RESTARTING
from server.engines.vllm.selftest import run_selftest
from server.engines.vllm.slots import Lease, SlotTable
from server.engines.vllm.taken import Asking, Taken
from server.engines.vllm.wire import extra_of
from steering.language.errors import EngineUnavailable, InvalidRequest, SlotsExhausted, TrimtabError
from steering.models.facts import ModelFacts
from steering.ops import operations
from steering.programs.program import Program
from steering.programs.touch import TouchMap


class VllmEngine(Engine):
    """vLLM in processes of its own. See `base.Engine` for the contract."""

    features = frozenset({"structured_outputs", "resume"})
    # vLLM takes what was generated before for prompt, which these treat differently.
    not_resumed = ("presence_penalty", "frequency_penalty", "json_schema")

    def __init__(self, options: VllmOptions) -> None:
        """
        Raises:
            InvalidSettings: an argument that vLLM refuses, or under which steering is not right.
            UnsupportedModel: no model there, or one of a family that is not steered in vLLM.
        """
        check_names(options)
        self.options = options
        self.reading: ModelReading = read_model(options)
        with awake(), quiet():
            engine_config(options, self.reading)
        self.facts: ModelFacts = self.reading.facts
        self.end_ids = self.reading.end_ids
        self.connection = Connection(options, self.reading, launched=self._forget_slots, prove=self._prove,
                                     lost=self._interrupt)
        self.slots = SlotTable(options.slots, self.connection.place, max_waiting=options.slot_queue)
        self._measure_slots = SlotTable(MEASURE_SLOTS, self.connection.place, first=options.slots + 1)
        self.asking = Asking(self.connection)
        self.measuring = Measuring(self.connection, self._measure_slots, self.facts.num_layers - 1, self.asking,
                                   options.step_limit)

    async def start(self) -> None:
        await self.connection.start()

    async def stop(self) -> None:
        await self.connection.stop()

    def generate(self, generation: Generation) -> VllmCompletion:
        self.connection.check_alive()
        check_tokens([*generation.prompt_ids, *generation.generated_ids], self.facts)
        check_room(generation, self.max_sequence_tokens)
        if generation.request_id in self.connection.running:
            raise InvalidRequest(f"request id {generation.request_id} is in use", param="request_id")
        wrong = [name for name in self.not_resumed if getattr(generation.sampling, name)]
        if generation.generated_ids and wrong:
            raise InvalidRequest(f"with {wrong[0]} a completion cannot be gone on with", param=wrong[0])
        return VllmCompletion(self, generation)

    async def score(self, token_ids: Sequence[int], program: Program | None = None, *, prompt_length: int | None = None,
                    roles: Sequence[str] | None = None, full: bool = False) -> Scores:
        check_tokens(token_ids, self.facts)
        return await self.measuring.score(token_ids, program, prompt_length, roles, full)

    async def next_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None = None) -> torch.Tensor:
        for token_ids in texts:
            check_tokens(token_ids, self.facts)
        return await self.measuring.next_logprobs(texts, program)

    async def capture(self, requests: Sequence[CaptureRequest], program: Program | None = None) -> list[Captured]:
        for request in requests:
            check_capture(request, self.facts)
        return await self.measuring.capture(requests, program)

    async def compare(self, request: CompareRequest) -> Comparison:
        return (await self.compare_all([request]))[0]

    async def compare_all(self, requests: Sequence[CompareRequest]) -> list[Comparison]:
        for request in requests:
            check_compare(request, self.facts)
        return await self.measuring.compare_all(requests)

    def capabilities(self) -> dict[str, Any]:
        in_graph = {site: STAGE_OPS[ops] for described in self.connection.described
                    for site, ops in described["graph"].items()}
        sites = {site: {"layers": list(layers), "width": self.facts.width(site), "ops": ops,
                        "in_graph": [op for op in ops if op in in_graph.get(site, ())]}
                 for site, layers in self.facts.sites.items()
                 for ops in [[op.name for op in operations() if site in op.sites]]}
        return {"engine": "vllm", "model": self.facts.model_id, "family": self.facts.family,
                "fingerprint": self.facts.fingerprint, "num_layers": self.facts.num_layers,
                "d_model": self.facts.d_model, "num_experts": self.facts.num_experts,
                "device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": engine_dtype(self.options),
                "compiled": not self.options.eager, "self_test": self.options.self_test, "sites": sites}

    def stats(self) -> dict[str, float]:
        return {"running": len(self.connection.running), "waiting": self.slots.num_waiting,
                "slots_total": self.slots.num_slots, "slots_used": self.slots.num_pinned,
                "slots_resident": self.slots.num_resident,
                "bank_bytes": float(sum(described["bytes"] for described in self.connection.described)),
                "restarts": self.connection.restarts.total(),
                "kv_blocks_total": max(2, -(-self.options.kv_cache_tokens // self.options.block_size))}

    def metrics(self) -> bytes:
        """vLLM's own metrics, which it keeps in the process-wide registry."""
        names = [name for name in REGISTRY._names_to_collectors if name.startswith("vllm:")]
        return generate_latest(REGISTRY.restricted_registry(names)) if names else b""

    @property
    def max_sequence_tokens(self) -> int:
        return context_of(self.options, self.reading)

    def condition(self) -> Condition:
        return self.connection.condition()

    def restarts(self) -> Mapping[Unready, int]:
        return dict(self.connection.restarts)

    # Used by completions.

    async def pin(self, program: Program) -> Lease:
        """A slot for the program, waiting for one in turn if need be."""
        self.connection.check_alive()
        try:
            async with asyncio.timeout(self.options.slot_wait_s):
                return await self.slots.lease(program)
        except TimeoutError:
            raise SlotsExhausted(f"all {self.options.slots} slots were in use for {self.options.slot_wait_s:g} s",
                                 param="steering", retry_after_s=5,
                                 fix="Send fewer distinct specs at a time, or start with more slots.") from None

    async def explain(self, program: Program | None, token_ids: Sequence[int], prompt_length: int,
                      roles: Sequence[str] | None, taken: Taken) -> TrimtabError:
        """Why a completion over these tokens was ended."""
        return await self.measuring.explained(Pass(token_ids, prompt_length, program, roles), taken)

    async def run(self, generation: Generation, program: Program | None, touch: TouchMap | None, slot: int, name: str
                  ) -> AsyncGenerator[Any]:
        """Outputs of vLLM for one completion, which workers know under `name`."""
        extra, before = extra_of(program, touch, slot) | {"name": name}, generation.generated_ids
        if before:
            extra["generated"] = len(before)
        sampling = replace(generation.sampling, max_tokens=generation.sampling.max_tokens - len(before))
        outputs = self.connection.outputs(generation.request_id, [*generation.prompt_ids, *before], sampling, extra)
        # Closed here and now: the abort must be on its way before the slot is another's.
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    # Used by the connection.

    def _forget_slots(self) -> None:
        self.slots.clear()
        self._measure_slots.clear()

    async def _prove(self) -> None:
        if self.options.self_test:
            self.facts = await run_selftest(self)

    async def _interrupt(self) -> None:
        """Those that wait for a slot of a dead vLLM need wait no longer."""
        for table in (self.slots, self._measure_slots):
            table.interrupt(EngineUnavailable("the engine stopped", fix=RESTARTING))
