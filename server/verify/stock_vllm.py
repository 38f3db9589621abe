"""vLLM as it comes, with the same scheduler and cache settings as ours."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

from server.engines.data import Sampling
from server.engines.vllm.host.sampling import sampling_params


class StockVllm:
    """vLLM's own asynchronous engine."""

    def __init__(self, **arguments: Any) -> None:
        """arguments: of `AsyncEngineArgs`."""
        self._arguments = arguments
        self._llm: Any = None
        self._names = itertools.count()

    async def start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments))

    async def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        return await asyncio.gather(*(self._one(prompt, max_tokens) for prompt in prompts))

    async def _one(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        params = sampling_params(Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True), {})
        found: list[int] = []
        async for output in self._llm.generate({"prompt_token_ids": list(prompt)}, params,
                                               f"stock-{next(self._names)}"):
            found += output.outputs[0].token_ids
        return found

    async def stop(self) -> None:
        self._llm.shutdown()
