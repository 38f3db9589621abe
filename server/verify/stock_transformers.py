"""The continuous batching of transformers as it comes, set up as the embedded engine sets it up."""

import asyncio
import gc
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from server.threads import in_thread


class StockTransformers:
    """A copy of the model under a manager of its own, read through its asynchronous handlers."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device, **batching: Any) -> None:
        """batching: fields of `ContinuousBatchingConfig`."""
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self._model = loaded.to(device).eval()
        config = ContinuousBatchingConfig(use_async_batching=False, use_cuda_graph=False, allow_block_sharing=False,
                                          **batching)
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = ContinuousBatchingManager(model=self._model, generation_config=generation,
                                                  continuous_batching_config=config)
        self._names = itertools.count()

    async def start(self) -> None:
        self._manager.warmup()
        self._manager.start()

    async def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        return await asyncio.gather(*(self._one(prompt, max_tokens) for prompt in prompts))

    async def _one(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        name, queue = f"stock-{next(self._names)}", asyncio.Queue[Any]()
        self._manager.register_result_handler(name, queue.put_nowait)
        self._manager.add_request(list(prompt), request_id=name, max_new_tokens=max_tokens, streaming=True,
                                  eos_token_id=-1)
        while not (output := await queue.get()).is_finished():
            pass
        return list(output.generated_tokens)

    async def stop(self) -> None:
        await in_thread(partial(self._manager.stop, block=True, hard_stop=True))
        del self._model, self._manager
        gc.collect()
