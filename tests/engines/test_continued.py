"""Scores from steps of the batching loop, against plain Hugging Face hooks and against passes of their own."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engines.data import ScoreRequest
from steering.language.errors import InvalidRequest, ModelOverflow, SteeringOverflow
from tests.engines import reference as ref
from tests.engines.cases import Case, dense_cases, moe_cases, vector
from tests.engines.conftest import compiled

TOLERANCE = 1e-4
D = 32
DENSE, MOE = dense_cases(D, 56, 4, 12), moe_cases(D)
# The same beginning of all texts is longer than a page.
SHARED = [3 + (5 * t) % 90 for t in range(11)]


def texts(count: int) -> list[list[int]]:
    return [[*SHARED, *(3 + (i * 7 + 3 * t + t * t) % 90 for t in range(7 + i % 5))] for i in range(count)]


@pytest.mark.parametrize(("family", "cases"), [("qwen3", DENSE), ("qwen3_moe", MOE)], ids=["dense", "moe"])
async def test_all_programs_at_once_equal_hooks(start_engine: Any, model_dir: Any, family: str, cases: list[Case]
                                                ) -> None:
    engine = await start_engine(family, max_batch_tokens=32)
    model = AutoModelForCausalLM.from_pretrained(model_dir(family), dtype=torch.float32).eval()
    programs = [None, *(compiled(engine, *spec) for spec, _ in cases)]
    edits = [[], *(edits for _, edits in cases)]
    given = texts(len(programs))
    starts = [len(text) - 3 - i % 3 for i, text in enumerate(given)]
    wanted = [ScoreRequest(text, start, program, guest=True)
              for text, start, program in zip(given, starts, programs, strict=True)]
    # The second time what they begin with is in the cache.
    for _ in range(2):
        scores = await engine.score_all(wanted)
        after = await engine.following([replace(one, start=len(one.token_ids)) for one in wanted])
        for i, (text, start) in enumerate(zip(given, starts, strict=True)):
            rows = ref.logprobs(model, text, start, edits[i])
            expected = rows[start - 1:-1].gather(1, torch.tensor(text[start:]).unsqueeze(1)).squeeze(1)
            assert scores[i].tolist() == pytest.approx(expected.tolist(), abs=TOLERANCE)
            whole = ref.logprobs(model, text, len(text), edits[i])[-1]
            assert torch.allclose(after[i], whole, atol=TOLERANCE)
    plain = await engine.score_all([replace(one, program=None) for one in wanted])
    shown = [float((own - bare).abs().max()) > 100 * TOLERANCE for own, bare in zip(scores[1:], plain[1:], strict=True)]
    # Some touch tokens alone that these texts do not have, or that come behind all that is scored.
    assert sum(shown) >= 0.7 * len(shown), "the specs do not show in this test"


async def test_what_is_in_the_cache_is_not_run_again(start_engine: Any) -> None:
    engine = await start_engine("qwen3", page_size=8, max_batch_tokens=512)
    taken: list[int] = []
    prepare = engine.steps._prepare

    def noted(batch: Any) -> None:
        taken.append(sum(item.query_length for item in batch))
        prepare(batch)

    engine.steps._prepare = noted
    push = compiled(engine, {"op": "add", "layers": [1], "inline": {"vector": vector(1, D).tolist()}})
    late = compiled(engine, {"op": "add", "layers": [1], "inline": {"vector": vector(1, D).tolist()},
                             "scope": {"prompt": {"positions": [-1]}}})
    text = list(range(3, 33))
    for program, expected in ((None, [29, 5]), (push, [29, 5]), (late, [5, 5])):
        for tokens in expected:
            taken.clear()
            await engine.score_all([ScoreRequest(text, 27, program)])
            # All tokens but the last; at most three pages of eight, as the row of token 26 is wanted.
            assert sum(taken) == tokens


@pytest.mark.parametrize("start", [0, 13])
async def test_something_stands_before_what_is_scored(start_engine: Any, start: int) -> None:
    engine = await start_engine("qwen3")
    with pytest.raises(InvalidRequest):
        await engine.score_all([ScoreRequest(list(range(3, 15)), start)])


async def test_without_room_for_the_rows_each_has_a_pass(start_engine: Any) -> None:
    given = [ScoreRequest(text, 12) for text in texts(3)]
    plain, poor = [await start_engine("qwen3", kept_bytes=size) for size in (2**20, 6 * 2 * D * 4)]
    for a, b in zip(await plain.score_all(given), await poor.score_all(given), strict=True):
        assert torch.allclose(a, b, atol=TOLERANCE)
    ends = [replace(one, start=len(one.token_ids)) for one in given]
    assert torch.allclose(await plain.following(ends), await poor.following(ends), atol=TOLERANCE)
    assert plain._room.left == 2**20


async def test_one_that_overflows_is_told_and_hurts_nobody(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    wild = compiled(engine, {"op": "add", "layers": [1], "inline": {"vector": [3e38] * D}})
    good = ScoreRequest(texts(1)[0], 12)
    before = await engine.score_all([good])
    results = await asyncio.gather(engine.score_all([good]), engine.score_all([replace(good, program=wild)]),
                                   return_exceptions=True)
    assert isinstance(results[1], SteeringOverflow | ModelOverflow)
    assert torch.equal(results[0][0], before[0])
