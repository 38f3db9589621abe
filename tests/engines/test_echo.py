"""Log-probabilities of prompts are those of plain transformers, steered by a plain hook or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines.test_batching import PROMPT, add, vector

# Long enough for rows to be read in several parts.
LONG = [5 + (7 * t) % 80 for t in range(200)]


def reference(folder: Path, ids: list[int], push: list[float] | None, layer: int) -> torch.Tensor:
    """`[T, vocab_size]`: row t is the distribution of token t, row 0 has no meaning."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if push is not None:
        model.model.layers[layer].register_forward_hook(
            lambda module, given, out: (out[0] + torch.tensor(push), *out[1:]) if isinstance(out, tuple)
            else out + torch.tensor(push))
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1).roll(1, 0)


@pytest.mark.parametrize("steered", [False, True])
async def test_echo_against_transformers(serve: Any, model_dir: Callable[[str], Path], steered: bool) -> None:  # noqa: F811
    spec = {"interventions": [add(1)]} if steered else {}
    async with serve(8) as (_, client):
        answer = await client.post("/v1/completions", json={
            "model": "tiny", "prompt": [PROMPT, LONG], "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": True,
            "prompt_logprobs": 2, "steering": spec})
        found = answer.json()
        alone = (await client.post("/v1/completions", json={
            "model": "tiny", "prompt": PROMPT, "max_tokens": 0, "logprobs": 2, "echo": True, "steering": spec})).json()
    for ids, choice in zip((PROMPT, LONG), found["choices"], strict=True):
        rows = reference(model_dir("qwen3"), ids, vector(1) if steered else None, 1)
        said = choice["logprobs"]["token_logprobs"]
        assert len(said) == len(ids) + 1
        for t in range(1, len(ids)):
            assert said[t] == pytest.approx(float(rows[t, ids[t]]), abs=1e-3)
            best = rows[t].topk(2)
            entry = choice["prompt_logprobs"][t]
            assert {int(token) for token in entry} == {ids[t], *best.indices.tolist()}
            own = entry[str(ids[t])]
            assert own["rank"] == 1 + int((rows[t] > rows[t, ids[t]]).sum())
            # Harnesses ask by equality whether a token was the likeliest one.
            assert (said[t] == max(choice["logprobs"]["top_logprobs"][t].values())) is (own["rank"] == 1)
    assert alone["choices"][0]["logprobs"]["token_logprobs"] == found["choices"][0]["logprobs"]["token_logprobs"][:-1]
    if steered:
        receipt = found["steering"]["applied"][0]["choices"]
        assert [c["prompt"] for c in receipt] == [len(PROMPT), len(LONG)]
        assert alone["steering"]["applied"][0]["tokens"] == {"prompt": len(PROMPT), "generation": 0}
        assert abs(said[5] - float(reference(model_dir("qwen3"), LONG, None, 1)[5, LONG[5]])) > 1e-2
