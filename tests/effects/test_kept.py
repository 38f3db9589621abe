"""Comparisons from what an engine kept while a completion was generated, against the same from passes run anew."""

import asyncio
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engines.data import CompareRequest, Comparison, Generation, Kept, Sampling
from server.engines.keeping import MOST_VIEWS, KeptRows, Room
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.head import Head
from steering.programs.program import Program
from tests.engines.conftest import compiled, model_dir, start_engine  # noqa: F401
from tests.tiny import FAMILIES, everything, tiny

PROMPT = [5 + (3 * t) % 80 for t in range(21)]
VECTOR = (torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3).tolist()
ADD = {"op": "add", "layers": [1], "inline": {"vector": VECTOR}}
ABLATE = {"op": "ablate", "layers": [1], "inline": {"vector": VECTOR[::-1]}}
GENERATED = {**ADD, "scope": {"prompt": "none"}}
LATE = {**ADD, "scope": {"prompt": "none", "generation": {"windows": [[5, 9]]}}}
EVERYWHERE = {**ADD, "layers": "all"}
NEVER = {**ADD, "scope": {"prompt": "none", "generation": {"windows": [[300, 301]]}}}


async def finished(engine: TransformersEngine, program: Program, number: int = 0, count: int = 12,
                   prompt: list[int] = PROMPT) -> CompareRequest:
    """A completion that was generated with its rows kept."""
    completion = engine.generate(Generation(f"made-{number}", prompt, Sampling(count, seed=number), program,
                                            keep_from=len(prompt) - 1))
    ids = [token.token_id async for token in completion]
    return CompareRequest([*prompt, *ids], len(prompt), program, end_ids=(3,), kept=completion.kept())


async def check(engine: TransformersEngine, request: CompareRequest) -> Comparison:
    """What was kept served, and gives what two passes give."""
    anew = await engine.compare(replace(request, kept=None))
    found = await engine.compare(request)
    assert (anew.rerun, found.rerun) == ("absent", None)
    for ours, theirs in zip((found.total, *found.without), (anew.total, *anew.without), strict=True):
        for name, expected in vars(theirs).items():
            assert getattr(ours, name).tolist() == pytest.approx(expected.tolist(), abs=2e-4), name
    assert found.residual.relative.tolist() == pytest.approx(anew.residual.relative.tolist(), abs=1e-4)
    assert found.residual.cosine.tolist() == pytest.approx(anew.residual.cosine.tolist(), abs=1e-4)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_alone_makes_the_logits_of_the_model(family: str) -> None:
    model = tiny(family, **everything(family)).eval()
    head = Head(model)
    assert head.usable
    head.listening = True
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    assert torch.equal(head.logits(head.rows(torch.arange(4))), logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2", "gpt2"])
async def test_what_was_kept_tells_what_two_passes_tell(start_engine: Any, family: str) -> None:  # noqa: F811
    engine = await start_engine(family)
    found = await check(engine, await finished(engine, compiled(engine, ADD)))
    assert found.total.kl.max() > 0.01


@pytest.mark.parametrize("specs", [[ADD, ABLATE], [GENERATED], [LATE], [NEVER], [LATE, GENERATED], [EVERYWHERE]])
async def test_stacks_and_scopes(start_engine: Any, specs: list[dict[str, Any]]) -> None:  # noqa: F811
    engine = await start_engine("qwen3", max_batch_tokens=16)
    request = await finished(engine, compiled(engine, *specs))
    found = await check(engine, request)
    if specs == [LATE]:
        # Until the first touched token both are one model, and here one pass.
        assert found.total.kl[:6].tolist() == [0.0] * 6 and found.total.kl[6:].max() > 0.01
    if specs == [NEVER]:
        assert found.total.kl.tolist() == [0.0] * 12


async def test_neighbours_are_measured_in_the_same_steps_and_cached_prefixes_are_read(
        start_engine: Any) -> None:  # noqa: F811
    engine = await start_engine("qwen3", page_size=8, kv_cache_tokens=2048)
    requests = [await finished(engine, compiled(engine, GENERATED), n) for n in range(4)]
    taken: list[tuple[int, int]] = []
    prepare = engine.steps._prepare

    def noted(batch: Any) -> None:
        taken.append((len(batch), sum(item.query_length for item in batch)))
        prepare(batch)

    engine.steps._prepare = noted  # type: ignore[method-assign]
    await asyncio.gather(*(engine.compare(request) for request in requests))
    # 33 tokens less the last one, of which two pages of the untouched prompt are in the cache.
    assert sum(tokens for _, tokens in taken) == 4 * (32 - 16)
    assert max(together for together, _ in taken) > 1


async def test_over_the_bound_the_rows_go_and_the_completion_is_measured_the_old_way(
        start_engine: Any) -> None:  # noqa: F811
    engine = await start_engine("qwen3", kept_bytes=5 * 2 * 32 * 4)
    request = await finished(engine, compiled(engine, ADD))
    assert request.kept is not None and request.kept.lost == "memory"
    found = await engine.compare(request)
    assert found.rerun == "memory"
    anew = await engine.compare(replace(request, kept=None))
    assert found.total.kl.tolist() == anew.total.kl.tolist()
    assert engine._room.left == 5 * 2 * 32 * 4


@pytest.mark.parametrize("leaves_after", [0, 3, None])
async def test_however_a_completion_ends_its_bytes_come_back(start_engine: Any, leaves_after: int | None  # noqa: F811
                                                             ) -> None:
    engine = await start_engine("qwen3")
    completion = engine.generate(Generation("one", PROMPT, Sampling(12), compiled(engine, ADD), keep_from=20))
    seen = 0
    if leaves_after != 0:
        async for _ in completion:
            seen += 1
            if seen == leaves_after:
                break
    kept: Kept | None = completion.kept()
    await completion.cancel()
    async with asyncio.timeout(30):
        while engine.roster.completions:
            await asyncio.sleep(0.01)
    assert leaves_after == 0 or engine._room.left < engine.options.kept_bytes
    del completion, kept
    # The step that ended it may still hold the last rows when the answer is there.
    async with asyncio.timeout(30):
        while engine._room.left != engine.options.kept_bytes:
            gc.collect()
            await asyncio.sleep(0.01)


def test_rows_that_come_again_are_the_first_ones_and_a_gap_is_a_loss() -> None:
    room = Room(10_000)
    kept = KeptRows(4, room)
    kept.add(4, torch.full((2, 3), 1.0), torch.full((2, 3), 2.0))
    assert kept.rows(3) is None and kept.stop == 6
    kept.add(7, torch.zeros(1, 3), torch.zeros(1, 3))
    assert kept.lost == "incomplete" and kept.rows(1) is None and room.left == 10_000


@pytest.mark.parametrize("steps", [3, MOST_VIEWS, MOST_VIEWS + 2])
def test_a_completion_that_is_over_holds_no_rows_of_others(steps: int) -> None:
    """Rows come as views of what all completions of a step keep."""
    kept = KeptRows(0, Room(10**6))
    shared = [torch.arange(8.0).view(4, 2) + step for step in range(steps)]
    for step, rows in enumerate(shared):
        kept.add(step, rows[1:2], rows[2:3])
    kept.settle()
    held = {part.untyped_storage().data_ptr() for part in (*kept._hidden, *kept._residual)}
    assert not held & {rows.untyped_storage().data_ptr() for rows in shared}
    found = kept.rows(steps)
    assert found is not None
    assert found[0][:, 0].tolist() == [2.0 + step for step in range(steps)]
    assert found[1][:, 0].tolist() == [4.0 + step for step in range(steps)]
