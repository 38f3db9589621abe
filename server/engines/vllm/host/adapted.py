"""The vLLM engine with an adapter on the model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from server.engines.adapters import Adapter
from server.engines.base import Completion, Engine
from server.engines.checks import check_tokens
from server.engines.data import Captured, CaptureRequest, CompareRequest, Comparison, Condition, Generation, Scores
from server.engines.vllm.host.measuring import Measuring
from steering.programs.program import Program


class AdaptedEngine(Engine):
    """Everything else is the engine's. Its facts name the adapter, so that artifacts made on it record it."""

    def __init__(self, engine: Engine, measuring: Measuring, adapter: Adapter) -> None:
        self._engine, self._measuring, self._adapter = engine, measuring, adapter
        self.facts = replace(engine.facts, model_id=adapter.name, adapter=adapter.ref)
        self.end_ids, self.features, self.not_resumed = engine.end_ids, engine.features, engine.not_resumed
        self.adapters = engine.adapters

    async def start(self) -> None:
        raise RuntimeError("the engine itself is started")

    async def stop(self) -> None:
        raise RuntimeError("the engine itself is stopped")

    def generate(self, generation: Generation) -> Completion:
        return self._engine.generate(replace(generation, adapter=self._adapter))

    async def score(self, token_ids: Sequence[int], program: Program | None = None, *, prompt_length: int | None = None,
                    roles: Sequence[str] | None = None, full: bool = False, top: int | None = None) -> Scores:
        check_tokens(token_ids, self.facts)
        return await self._measuring.score(token_ids, program, prompt_length, roles, full, top, self._adapter)

    async def next_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None = None) -> torch.Tensor:
        for token_ids in texts:
            check_tokens(token_ids, self.facts)
        return await self._measuring.next_logprobs(texts, program, self._adapter)

    async def capture(self, requests: Sequence[CaptureRequest], program: Program | None = None) -> list[Captured]:
        return await self._engine.capture([replace(one, adapter=self._adapter) for one in requests], program)

    async def compare(self, request: CompareRequest) -> Comparison:
        return await self._engine.compare(replace(request, adapter=self._adapter))

    async def compare_all(self, requests: Sequence[CompareRequest]) -> list[Comparison]:
        return await self._engine.compare_all([replace(one, adapter=self._adapter) for one in requests])

    def capabilities(self) -> dict[str, Any]:
        return self._engine.capabilities()

    def stats(self) -> dict[str, float]:
        return self._engine.stats()

    def condition(self) -> Condition:
        return self._engine.condition()

    def restarts(self) -> Mapping[Any, int]:
        return self._engine.restarts()

    @property
    def max_sequence_tokens(self) -> int:
        return self._engine.max_sequence_tokens
