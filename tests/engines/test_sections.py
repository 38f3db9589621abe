"""Scopes that name sections on the embedded engine."""

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from server.engines.data import Generation, Sampling
from steering.language.errors import InvalidSpec
from tests.engines.conftest import compiled, generate
from tests.engines.section_cases import scopes_follow_sections
from tests.engines.test_batching import PROMPT, add


def prompt_of(i: int) -> list[int]:
    return [5 + (3 * t + 7 * i) % 80 for t in range(20)]


@pytest.mark.parametrize("cache", [4096, 320])
async def test_scopes_follow_sections(start_engine: Any, model_dir: Any, cache: int) -> None:
    """With room for all, and with so little that some are thrown out and computed again."""
    engine = await start_engine("qwen3", kv_cache_tokens=cache)
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3")).eval()
    await scopes_follow_sections(engine, model, prompt_of, count=12, new_tokens=40)


async def test_a_program_that_does_not_know_how_sections_are_told_is_refused(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    program = compiled(engine, add(1, scope={"generation": {"sections": ["answer"]}}))
    with pytest.raises(InvalidSpec, match="in completions alone"):
        engine.generate(Generation("r", PROMPT, Sampling(max_tokens=2), program))


async def test_cached_prefixes_are_not_shared_across_salts(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    cache, matched = engine.supervisor.manager.batch_processor.cache, []
    search = cache.search_prefix_match
    cache.search_prefix_match = lambda request_id, ids: (matched.append(search(request_id, ids)), matched[-1])[1]
    program, found = compiled(engine, add(1)), []
    for salt, steered in ((None, False), ("a", False), ("a", False), ("b", False), (None, False), ("a", True),
                          (None, True), ("a", True)):
        completion = engine.generate(Generation(f"salted-{len(matched)}", PROMPT, Sampling(
            max_tokens=4, temperature=0.0), program if steered else None, cache_salt=salt))
        found.append([token.token_id async for token in completion])
    assert matched == [0, 0, 32, 0, 32, 0, 0, 32]
    assert found[0] == found[1] == found[3] == found[4] and found[5] == found[6] == found[7]
    plain, _ = await generate(engine, PROMPT, max_tokens=4)
    assert [token.token_id for token in plain] == found[0]
