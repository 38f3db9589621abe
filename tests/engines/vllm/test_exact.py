"""vLLM's log-probabilities against plain Hugging Face hooks: every op, mixed batch, compiled and eager."""

import asyncio
import json
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lab import model_path
from server.engines.base import CaptureRequest, CompareRequest
from tests.engines import reference as ref
from tests.engines.cases import Case, dense_cases, moe_cases, vector
from tests.engines.conftest import compiled, generate, ids
from tests.engines.vllm.conftest import GROUPS, Group

pytestmark = [pytest.mark.asyncio(loop_scope="module"),
              pytest.mark.parametrize("group", GROUPS, indirect=True)]
TOLERANCE = 1e-4


def _cases(group: Group) -> list[Case]:
    facts = group.engine.facts
    if facts.num_experts:
        return moe_cases(facts.d_model, scale=2.0)
    return dense_cases(facts.d_model, facts.d_ff, facts.num_heads, facts.head_dim, facts.num_layers, 2.0)


def _prompt(i: int) -> list[int]:
    return [30 + (i * 71 + 53 * t + t * t) % 900 for t in range(6 + 7 * (i % 5))]


async def test_mixed_batch_equals_hooks(group: Group) -> None:
    """All specs and an unsteered request at once, twice: the second time prompts come from the cache."""
    cases = _cases(group)
    programs = [None, *(compiled(group.engine, *spec) for spec, _ in cases)]
    edits = [[], *(edits for _, edits in cases)]
    for _ in range(2):
        mixed = await asyncio.gather(*(generate(group.engine, _prompt(i), p) for i, p in enumerate(programs)))
        for i, (tokens, _) in enumerate(mixed):
            _check(group, _prompt(i), tokens, edits[i], steered=i > 0)


def _check(group: Group, prompt: list[int], tokens: Any, edits: Any, steered: bool) -> None:
    rows = ref.logprobs(group.model, prompt + ids(tokens), len(prompt), edits)[len(prompt) - 1:-1]
    for token, row in zip(tokens, rows, strict=True):
        assert token.token_id == int(row.argmax())
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE)
        for other, value in token.top_logprobs:
            assert value == pytest.approx(float(row[other]), abs=TOLERANCE)
    if steered:
        base = ref.logprobs(group.model, prompt + ids(tokens), len(prompt), [])[len(prompt) - 1:-1]
        assert float((base - rows).abs().max()) > 100 * TOLERANCE, "the spec does not show in this test"


async def test_scores_equal_hooks(group: Group) -> None:
    prompt = _prompt(4)
    for spec, edits in _cases(group):
        scores = await group.engine.score(prompt, compiled(group.engine, *spec), prompt_length=8, full=True)
        expected = ref.logprobs(group.model, prompt, 8, edits)
        assert scores.full is not None
        assert float((scores.full - expected).abs().max()) < TOLERANCE
        chosen = expected[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        assert torch.allclose(scores.logprobs[1:], chosen, atol=TOLERANCE)


async def test_next_logprobs_equal_hooks(group: Group) -> None:
    spec, edits = _cases(group)[0]
    texts = [_prompt(i) for i in range(5)]
    found = await group.engine.next_logprobs(texts, compiled(group.engine, *spec))
    expected = torch.stack([ref.logprobs(group.model, text, len(text), edits)[-1] for text in texts])
    assert torch.allclose(found, expected, atol=TOLERANCE)


async def test_many_programs_through_few_slots(group: Group) -> None:
    """200 distinct programs cycle through 32 slots; a sample is checked against hooks, memory stays as it is."""
    facts = group.engine.facts
    vectors = [vector(100 + n, facts.d_model, 6.0) for n in range(200)]
    programs = [compiled(group.engine, {"op": "add", "layers": [n % 6], "inline": {"vector": v.tolist()}})
                for n, v in enumerate(vectors)]
    before = (await group.engine.rpc("trimtab_describe"))[0]["bytes"]
    for start in range(0, 200, 25):
        part = range(start, start + 25)
        done = await asyncio.gather(*(generate(group.engine, _prompt(n), programs[n], max_tokens=3) for n in part))
        n = start + 7
        _check(group, _prompt(n), done[7][0], [ref.Edit("resid_post", n % 6, ref.add(vectors[n]), ref.everywhere)],
               steered=True)
    assert group.engine.slots.num_resident == 32
    assert group.engine.slots.num_pinned == 0
    assert (await group.engine.rpc("trimtab_describe"))[0]["bytes"] <= before + 64 * 4 * facts.d_model


async def test_capture_is_what_hooks_see(group: Group) -> None:
    spec, edits = _cases(group)[0]
    token_ids = _prompt(3)
    requests = [CaptureRequest(token_ids, {"resid_post": [0, 5], "mlp_out": [2]}, [-1, 2, 2]),
                CaptureRequest(token_ids[:9], {"resid_pre": [3], "attn_out": [1]})]
    for program, given in ((None, []), (compiled(group.engine, *spec), edits)):
        found = await group.engine.capture(requests, program)
        for request, one in zip(requests, found, strict=True):
            rows = list(range(len(request.token_ids))) if request.positions is None else [-1, 2, 2]
            for site, layers in request.sites.items():
                for layer in layers:
                    expected = _seen(group.model, request.token_ids, given, site, layer)[rows]
                    assert one[site][layer].shape == expected.shape
                    assert torch.allclose(one[site][layer], expected, atol=1e-3)


def _seen(model: Any, token_ids: Any, edits: Any, site: str, layer: int) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def look(h: torch.Tensor) -> torch.Tensor:
        seen.append(h.clone())
        return h

    ref.logprobs(model, token_ids, len(token_ids), [*edits, ref.Edit(site, layer, look, ref.everywhere)])
    return seen[0]


async def test_comparison_equals_two_plain_passes(group: Group) -> None:
    specs = [spec for spec, _ in _cases(group)]
    edits = [edits for _, edits in _cases(group)]
    program = compiled(group.engine, *specs[0], *specs[-1])
    token_ids, length = _prompt(4), 9
    found = await group.engine.compare(CompareRequest(token_ids, length, program))

    def rows(given: Any) -> torch.Tensor:
        return ref.logprobs(group.model, token_ids, length, given)[length - 1:-1]

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(-1)

    steered = rows([*edits[0], *edits[-1]])
    assert torch.allclose(found.total.kl, kl(steered, rows([])), atol=TOLERANCE)
    assert torch.allclose(found.total.entropy, -(steered.exp() * steered).sum(-1), atol=TOLERANCE)
    if len(program.compiled) == 2:
        assert torch.allclose(found.without[0].kl, kl(steered, rows(edits[-1])), atol=TOLERANCE)
        assert torch.allclose(found.without[1].kl, kl(steered, rows(edits[0])), atol=TOLERANCE)


async def test_answers_of_a_json_schema(group: Group) -> None:
    """vLLM's structured outputs are reached, steered or not."""
    schema = {"type": "object", "properties": {"day": {"enum": ["Monday", "Friday"]}}, "required": ["day"],
              "additionalProperties": False}
    tokenizer = AutoTokenizer.from_pretrained(model_path(group.name))
    push = compiled(group.engine, {"op": "add", "layers": [2], "strength": 30.0,
                                   "inline": {"vector": vector(1, group.engine.facts.d_model).tolist()}})
    for program in (None, push):
        tokens, _ = await generate(group.engine, tokenizer.encode("One day after Sunday is"), program, max_tokens=60,
                                   json_schema=schema, stop_token_ids=group.engine.end_ids)
        assert tokens[-1].finish_reason == "stop"
        answer = json.loads(tokenizer.decode(ids(tokens), skip_special_tokens=True))
        assert answer["day"] in ("Monday", "Friday")
