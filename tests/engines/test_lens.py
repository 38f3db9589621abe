"""The lenses against plain transformers: norm and unembedding of each layer's hidden states, mapped and steered."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.requests.lens import Map, look
from tests.engines import reference as ref
from tests.engines.conftest import compiled, generate
from tests.engines.test_gates import ADD, PROMPTS, VECTOR

LAYERS = [0, 1, 2]
POSITIONS = list(range(24))


def plain(model: Any, edits: list[ref.Edit]) -> dict[int, torch.Tensor]:
    """Hidden states behind every block, `[T, d]`."""
    held: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> ref.Edit:
        def function(h: torch.Tensor) -> torch.Tensor:
            held[layer] = h
            return h

        return ref.Edit("resid_post", layer, function, ref.everywhere)

    ref.logprobs(model, PROMPTS[0], len(PROMPTS[0]), [*edits, *(keep(layer) for layer in LAYERS)])
    return held


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama", "gemma2"])
async def test_logit_lens(start_engine: Any, model_dir: Any, family: str) -> None:
    engine = await start_engine(family)
    model = AutoModelForCausalLM.from_pretrained(model_dir(family), dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(input_ids=torch.tensor([PROMPTS[0]]), output_hidden_states=True)
        expected = [model.lm_head(model.model.norm(h[0])) for h in output.hidden_states[1:-1]]
        if getattr(model.config, "final_logit_softcapping", None):
            cap = model.config.final_logit_softcapping
            expected = [cap * torch.tanh(logits / cap) for logits in expected]
    seen = await look(engine, PROMPTS[0], LAYERS, POSITIONS, None, None, read=list)
    for layer, logits in zip(LAYERS[:-1], expected, strict=True):
        torch.testing.assert_close(torch.stack(seen.layers[layer]), logits.log_softmax(-1), atol=1e-4, rtol=0)
    # The last layer needs no lens.
    torch.testing.assert_close(torch.stack(seen.layers[2]), output.logits[0].log_softmax(-1), atol=1e-4, rtol=0)


async def test_tuned_and_steered(start_engine: Any, model_dir: Any) -> None:
    engine = await start_engine("qwen3")
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    maps = {layer: {"scale": 1 + torch.rand(32, generator=generator), "shift": torch.randn(32, generator=generator)}
            for layer in (0, 1)}
    scope = {"prompt": {"windows": [[5, None]]}}
    edits = [ref.Edit("resid_post", 1, ref.add(VECTOR), ref.prompt_window(5, 99))]
    held = plain(model, edits)
    program = compiled(engine, {**ADD, "scope": scope})
    seen = await look(engine, PROMPTS[0], LAYERS, [3, -1, 10], program, Map("lens@1", maps), read=list)
    assert list(seen.positions) == [3, 23, 10]
    with torch.no_grad():
        for layer in LAYERS:
            h = held[layer][[3, 23, 10]]
            mapped = h * maps[layer]["scale"] + maps[layer]["shift"] if layer in maps else h
            expected = model.lm_head(model.model.norm(mapped)).log_softmax(-1)
            torch.testing.assert_close(torch.stack(seen.layers[layer]), expected, atol=1e-4, rtol=0)


async def test_more_rows_than_one_program_holds_beside_generation(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    alone, _ = await generate(engine, PROMPTS[1])
    seen = await look(engine, PROMPTS[0] * 3, [0, 2], list(range(72)), None, None, read=list)
    parts = [await look(engine, PROMPTS[0] * 3, [0, 2], [n], None, None, read=list) for n in (0, 40, 71)]
    for part in parts:
        n = part.positions[0]
        for layer in (0, 2):
            torch.testing.assert_close(seen.layers[layer][n], part.layers[layer][0], atol=1e-4, rtol=0)
    again, _ = await generate(engine, PROMPTS[1])
    assert [t.token_id for t in alone] == [t.token_id for t in again]
