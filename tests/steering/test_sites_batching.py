"""Sites under transformers' continuous batching: many requests in one flat batch, steered, against one at a time."""

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from steering.models.describe import model_facts
from steering.models.taps import attach
from tests.sweeps import sweep_of
from tests.tiny import VOCAB_SIZE, tiny

torch.set_num_threads(1)

NEW_TOKENS = 8
PLAN = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=VOCAB_SIZE + 1, pad_token_id=0)


# One of each kind of block. Latent attention (DeepSeek) is missing: the paged cache of transformers 5.19 gives keys and
# values one width.
@pytest.mark.parametrize("family", sweep_of("llama", "gpt2", "mixtral", slow=[
    "gemma3_text", "gpt_neox", "phi3", "olmo2", "qwen2_moe"]))
def test_all_sites_steered_in_a_flat_batch(family: str) -> None:
    model = tiny(family)
    facts = model_facts(model, model_id="tiny", fingerprint="")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (5, 9, 13)]
    widest = 0

    def edit(x: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, len(x))
        return x * 1.3 + 0.1

    plain = [_alone(model, prompt) for prompt in prompts]
    for site, layers in facts.sites.items():
        attach(model, site, layers[-1], edit)
    steered = [_alone(model, prompt) for prompt in prompts]
    assert steered != plain
    widest = 0

    manager = model.init_continuous_batching(
        generation_config=PLAN, continuous_batching_config=ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64))
    names = [manager.add_request(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]
    manager.start()
    try:
        results = {}
        while len(results) < len(prompts):
            result = manager.get_result(timeout=30)
            assert result is not None and result.error is None
            results[result.request_id] = result.generated_tokens
    finally:
        manager.stop(block=True)
    assert [results[name] for name in names] == steered
    assert widest > max(map(len, prompts)), "the requests did not share a batch"


def _alone(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=PLAN)
    return out[0, len(prompt):].tolist()
