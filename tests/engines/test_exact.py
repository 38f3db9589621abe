"""The engine's log-probabilities against plain Hugging Face hooks: every op, a dozen different specs in one batch."""

import asyncio
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engines.base import Engine
from tests.engines import reference as ref
from tests.engines.cases import Case, dense_cases, moe_cases, vector
from tests.engines.conftest import compiled, generate, ids

TOLERANCE = 1e-4
D = 32
DENSE, MOE = dense_cases(D, 56, 4, 12), moe_cases(D)


def _prompt(i: int) -> list[int]:
    return [3 + (i * 7 + 5 * t + t * t) % 90 for t in range(6 + i % 5)]


@pytest.mark.parametrize(("family", "cases"), [("qwen3", DENSE), ("qwen3_moe", MOE)],
                         ids=["dense", "moe"])
async def test_mixed_batch_equals_hooks(start_engine: Any, model_dir: Any, family: str, cases: list[Case]) -> None:
    """All specs and an unsteered request at once, prefilled in chunks of 16 tokens: each as if it were alone."""
    engine = await start_engine(family, max_batch_tokens=16, max_requests=16)
    model = AutoModelForCausalLM.from_pretrained(model_dir(family), dtype=torch.float32).eval()
    programs = [None, *(compiled(engine, *spec) for spec, _ in cases)]
    edits = [[], *(edits for _, edits in cases)]
    assert len(cases) >= 12
    mixed = await asyncio.gather(*(generate(engine, _prompt(i), p) for i, p in enumerate(programs)))
    for i, (tokens, _) in enumerate(mixed):
        prompt = _prompt(i)
        expected = ref.logprobs(model, prompt + ids(tokens), len(prompt), edits[i])[len(prompt) - 1:-1]
        for token, row in zip(tokens, expected, strict=True):
            assert token.token_id == int(row.argmax())
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE)
            for other, value in token.top_logprobs:
                assert value == pytest.approx(float(row[other]), abs=TOLERANCE)
        if i:
            base = ref.logprobs(model, prompt + ids(tokens), len(prompt), [])[len(prompt) - 1:-1]
            assert float((base - expected).abs().max()) > 100 * TOLERANCE, "the spec does not show in this test"


@pytest.mark.parametrize(("family", "cases"), [("qwen3", DENSE), ("qwen3_moe", MOE)],
                         ids=["dense", "moe"])
async def test_alone_mixed_cached_and_scored_agree(start_engine: Any, family: str, cases: list[Case]) -> None:
    engine = await start_engine(family)
    prompt = [5 + (3 * t) % 80 for t in range(21)]
    programs = [compiled(engine, *spec) for spec, _ in cases]
    alone = [await generate(engine, prompt, p) for p in programs]
    # The second time all at once, on the same prompt: every page but the last is in the cache, salted by program.
    mixed = await asyncio.gather(*(generate(engine, prompt, p) for p in programs))
    for program, (first, touched), (second, touched_again) in zip(programs, alone, mixed, strict=True):
        assert ids(first) == ids(second)
        assert touched == touched_again
        for a, b in zip(first, second, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=TOLERANCE)
        scores = await engine.score(prompt + ids(first), program, prompt_length=len(prompt))
        assert scores.logprobs[len(prompt):].tolist() == pytest.approx([t.logprob for t in first], abs=TOLERANCE)


@pytest.mark.parametrize("spec", [
    {"op": "add", "layers": "all", "inline": {"vector": vector(1, D).tolist()}, "strength": 0},
    {"op": "ablate", "layers": [1], "inline": {"vector": vector(1, D).tolist()}, "strength": 0},
    {"op": "sign_flip", "layers": [1], "inline": {"dims": [1, 2], "polarity": [1, -1]}, "strength": 0},
], ids=["add", "ablate", "sign_flip"])
async def test_strength_zero_is_bit_identical(start_engine: Any, spec: dict[str, Any]) -> None:
    engine = await start_engine("qwen3")
    plain = await engine.score(list(range(3, 40)), full=True)
    steered = await engine.score(list(range(3, 40)), compiled(engine, spec), full=True)
    assert torch.equal(plain.full, steered.full)
    tokens, _ = await generate(engine, [3, 4, 5, 6])
    again, touched = await generate(engine, [3, 4, 5, 6], compiled(engine, spec))
    assert [(t.token_id, t.logprob) for t in tokens] == [(t.token_id, t.logprob) for t in again]
    assert touched[0].prompt == touched[0].generation == 0


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
async def test_next_tokens_of_many_texts_are_those_of_each_alone(start_engine: Any, family: str) -> None:
    """Texts of ten lengths in few passes, against the contract's own way: one text at a time."""
    engine = await start_engine(family)
    texts = [[5 + (3 * t + 7 * n) % 80 for t in range(3 + n % 10)] for n in range(21)]
    last = compiled(engine, {"op": "add", "layers": [1], "inline": {"vector": vector(1, D, 3.0).tolist()},
                             "scope": {"prompt": {"positions": [-1]}}})
    for program in (None, last):
        together = await engine.next_logprobs(texts, program)
        alone = await Engine.next_logprobs(engine, texts, program)
        assert torch.allclose(together, alone, atol=TOLERANCE)
    assert float((alone - await engine.next_logprobs(texts)).abs().max()) > 100 * TOLERANCE
