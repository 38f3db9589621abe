"""Scopes do not depend on how vLLM runs a request: chunks, preemption, cached prefixes, choices, aborts.

One eager engine with a cache of 12 blocks of 32 tokens and four slots for programs, on lab-dense.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from server.engines.data import Generation, Sampling
from server.engines.slots import Lease
from server.engines.vllm import wire
from server.engines.vllm.host import connection as connection_module
from server.errors import status_of
from steering.language.errors import InvalidRequest, InvalidSpec, ProgramLost, SlotsExhausted
from steering.programs.program import Program
from tests.engines import reference as ref
from tests.engines.cases import vector
from tests.engines.conftest import compiled, generate, ids
from tests.engines.section_cases import scopes_follow_sections
from tests.engines.vllm import checks
from tests.engines.vllm.conftest import ONE_PROCESS, TIGHT, Group, running

pytestmark = pytest.mark.asyncio(loop_scope="module")
BLOCK = 32


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group() -> AsyncIterator[Group]:
    async with running("lab-dense", eager=True, slots=4, slot_wait_s=60, **TIGHT, **ONE_PROCESS) as started:
        yield started


def add(group: Group, seed: int, scope: dict[str, Any] | None = None, layer: int = 1) -> Program:
    return compiled(group.engine, {"op": "add", "layers": [layer], "inline": {"vector": push(group, seed).tolist()},
                                   "scope": scope or {}})


def push(group: Group, seed: int) -> Any:
    return vector(seed, group.engine.facts.d_model, 5.0)


def edit(group: Group, seed: int, touched: Any = ref.everywhere, layer: int = 1) -> ref.Edit:
    return ref.Edit("resid_post", layer, ref.add(push(group, seed)), touched)


def between(start: int, stop: int) -> Any:
    return lambda prompt, total: [start <= t < stop for t in range(total)]


@pytest.mark.slow
async def test_all_specs_through_four_slots(group: Group) -> None:
    await checks.mixed_batch_equals_hooks(group, rounds=1)


async def test_preempted_requests_are_right_when_they_return(group: Group) -> None:
    await checks.preempted_requests_stay_right(group)


async def test_a_seeds_draws_begin_behind_the_prompt_however_it_is_cut(group: Group) -> None:
    await checks.seeded_draws_do_not_depend_on_chunks(group)


async def test_a_request_may_fill_the_whole_cache(group: Group) -> None:
    prompt = checks.prompt_of(5, 200)
    tokens, _ = await generate(group.engine, prompt, add(group, 40), max_tokens=56, logprobs=0)
    checks.check_tokens(group, prompt, tokens, [edit(group, 40)], steered=True)
    with pytest.raises(InvalidRequest, match="256"):
        await generate(group.engine, prompt, max_tokens=57)


@pytest.mark.parametrize("window", [(60, 70), (63, 64), (64, 65), (127, 150), (0, 1)])
async def test_windows_across_chunks(group: Group, window: tuple[int, int]) -> None:
    """A prompt of 150 tokens comes in chunks of 64; a window is where it is, wherever a chunk ends."""
    prompt = checks.prompt_of(window[0], 150)
    scope = {"prompt": {"windows": [list(window)]}, "generation": "none"}
    # Beside another request, so that the chunks end elsewhere than at multiples of 64.
    (tokens, touched), (other, _) = await asyncio.gather(
        generate(group.engine, prompt, add(group, 50, scope), max_tokens=4),
        generate(group.engine, checks.prompt_of(3, 23), add(group, 51), max_tokens=30))
    checks.check_tokens(group, prompt, tokens, [edit(group, 50, between(*window))], steered=True)
    checks.check_tokens(group, checks.prompt_of(3, 23), other, [edit(group, 51)], steered=True)
    assert (touched[0].prompt, touched[0].generation) == (window[1] - window[0], 0)


async def test_choices_are_steered_each_by_itself(group: Group) -> None:
    """n choices are n generations that share the prompt's blocks and one slot; each draws its own tokens."""
    prompt = checks.prompt_of(7, 40)
    program = add(group, 60, {"prompt": {"positions": [-1]}, "generation": {"windows": [[0, 5]]}})
    choices = await asyncio.gather(*(generate(group.engine, prompt, program, temperature=1.0, seed=seed, max_tokens=10)
                                     for seed in range(4)))

    def touched(length: int, total: int) -> list[bool]:
        return [length - 1 <= t < length + 5 for t in range(total)]

    for tokens, counted in choices:
        checks.check_tokens(group, prompt, tokens, [edit(group, 60, touched)], steered=True, greedy=False)
        assert (counted[0].prompt, counted[0].generation) == (1, 5)
    assert len({tuple(ids(tokens)) for tokens, _ in choices}) > 1
    assert group.engine.slots.num_pinned == 0


async def test_rules_by_generated_token_id(group: Group) -> None:
    await checks.rules_by_generated_token_id(group)


@pytest.mark.slow
async def test_scopes_that_name_sections(group: Group) -> None:
    """Those that come back after they were thrown out are tried in `test_sections.py`, without an engine."""
    await scopes_follow_sections(group.engine, group.model, lambda i: checks.prompt_of(i, 24), count=16, new_tokens=44)


async def test_roles_pick_the_tokens_of_a_turn(group: Group) -> None:
    prompt = checks.prompt_of(11, 33)
    roles = ["system"] * 10 + ["user"] * 15 + ["assistant"] * 8
    program = add(group, 80, {"prompt": {"roles": ["user"]}, "generation": "none"})
    tokens, touched = await generate(group.engine, prompt, program, roles=roles)
    checks.check_tokens(group, prompt, tokens, [edit(group, 80, between(10, 25))], steered=True)
    assert (touched[0].prompt, touched[0].generation) == (15, 0)
    with pytest.raises(InvalidSpec, match="no chat roles"):
        group.engine.generate(Generation("no-roles", prompt, Sampling(max_tokens=2), program))


async def _cached(group: Group, prompt: list[int], program: Program | None, edits: list[ref.Edit], **settings: Any
                  ) -> int:
    """Run a prompt, compare with hooks, and say how many of its tokens came from the cache."""
    before = checks.metric(group.engine, "prefix_cache_hits")
    tokens, _ = await generate(group.engine, prompt, program, max_tokens=4)
    checks.check_tokens(group, prompt, tokens, edits, steered=program is not None)
    return int(checks.metric(group.engine, "prefix_cache_hits") - before)


async def test_prefixes_are_shared_up_to_the_first_touched_block(group: Group) -> None:
    prompt = checks.prompt_of(13, 70)
    only_new = {"prompt": "none"}
    late = {"prompt": {"windows": [[40, None]]}}
    expected = [
        (None, [], 0),
        (None, [], 64),
        # What acts on generated tokens alone has the plain prompt's cache.
        (add(group, 90, only_new), [edit(group, 90, ref.generated_only)], 64),
        (add(group, 90), [edit(group, 90)], 0),
        (add(group, 90), [edit(group, 90)], 64),
        # Another vector, and the same at another layer: nothing is shared.
        (add(group, 91), [edit(group, 91)], 0),
        (add(group, 90, layer=2), [edit(group, 90, layer=2)], 0),
        # Untouched up to token 40: the first block is the plain prompt's, the second its own.
        (add(group, 90, late), [edit(group, 90, between(40, 10**6))], 32),
        (add(group, 90, late), [edit(group, 90, between(40, 10**6))], 64),
        (None, [], 64),
    ]
    found = [await _cached(group, prompt, program, edits) for program, edits, _ in expected]
    assert found == [count for _, _, count in expected]


async def test_steered_answers_are_not_taken_for_plain_prompts(group: Group) -> None:
    """A conversation goes on: its second prompt holds an answer that was steered, in blocks that must not be reused."""
    prompt = checks.prompt_of(15, 40)
    program = add(group, 95, {"prompt": "none"})
    tokens, _ = await generate(group.engine, prompt, program, max_tokens=50)
    follow_up = [*prompt, *ids(tokens)]
    # 89 tokens went through the model: two full blocks, of which one holds no answer.
    assert await _cached(group, follow_up, None, []) == BLOCK
    assert await _cached(group, follow_up, None, []) == 2 * BLOCK


async def test_without_the_program_in_the_key_wrong_answers_appear(group: Group, monkeypatch: pytest.MonkeyPatch
                                                                   ) -> None:
    """Negative control of the tests above: blocks keyed as if all programs were one leak from each to the next."""
    prompt = checks.prompt_of(17, 70)
    for module in (wire, connection_module):
        monkeypatch.setattr(module, "name_of", lambda program: "one and the same")
    assert await _cached(group, prompt, add(group, 100), [edit(group, 100)]) == 0
    tokens, _ = await generate(group.engine, prompt, add(group, 101), max_tokens=4)
    rows = checks.rows_of(group, prompt, ids(tokens), [edit(group, 101)])
    off = max(abs(token.logprob - float(row[token.token_id])) for token, row in zip(tokens, rows, strict=True))
    assert off > 1000 * checks.TOLERANCE
    monkeypatch.undo()
    # Workers that hold programs under other names than the server knows are not taken at their word.
    with pytest.raises(ProgramLost):
        await generate(group.engine, prompt, add(group, 101), max_tokens=4)
    assert await _cached(group, prompt, add(group, 101), [edit(group, 101)]) == 0


async def test_aborts_free_slots_and_leave_no_wrong_answers(group: Group) -> None:
    """Requests are dropped at any point of their life while others run; those that stay are right."""
    engine = group.engine

    async def leave(seed: int, after: int) -> None:
        completion = engine.generate(Generation(f"leaver-{seed}", checks.prompt_of(seed, 70), Sampling(
            max_tokens=150, temperature=0.0), add(group, 200 + seed)))
        count = 0
        async for _ in completion:
            count += 1
            if count > after:
                break
        await completion.cancel()

    async def stay(seed: int) -> None:
        prompt = checks.prompt_of(seed, 30)
        tokens, _ = await generate(engine, prompt, add(group, 220 + seed), max_tokens=20)
        checks.check_tokens(group, prompt, tokens, [edit(group, 220 + seed)], steered=True)

    leavers = [asyncio.ensure_future(leave(seed, seed % 4)) for seed in range(8)]
    hasty = [asyncio.ensure_future(leave(20 + seed, 9)) for seed in range(4)]
    staying = asyncio.gather(*(stay(seed) for seed in range(8)))
    while sum(task.done() for task in leavers) < 3:
        await asyncio.wait(leavers, return_when=asyncio.FIRST_COMPLETED)
        leavers = [task for task in leavers if not task.done()] or leavers
        break
    for task in hasty:
        task.cancel()
    await asyncio.gather(*leavers, *hasty, return_exceptions=True)
    await staying
    assert engine.slots.num_pinned == 0 and not engine.connection.running and engine.stats()["waiting"] == 0
    # The prompts of those that left, again: what they left in the cache is right.
    prompt = checks.prompt_of(2, 70)
    await _cached(group, prompt, add(group, 202), [edit(group, 202)])
    await _cached(group, prompt, add(group, 203), [edit(group, 203)])


async def test_vllm_hears_of_an_abort_before_the_slot_is_given_away(group: Group, monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    engine, order = group.engine, []
    abort, release = engine.connection._llm.abort, Lease.release

    async def aborting(*args: Any, **kwargs: Any) -> Any:
        result = await abort(*args, **kwargs)
        order.append("abort")
        return result

    monkeypatch.setattr(engine.connection._llm, "abort", aborting)
    monkeypatch.setattr(Lease, "release", lambda lease: (order.append("release"), release(lease)))
    completion = engine.generate(Generation("long", checks.prompt_of(1), Sampling(max_tokens=200, temperature=0.0),
                                            add(group, 240)))
    async for _ in completion:
        break
    await completion.cancel()
    assert order == ["abort", "release"]


async def test_all_slots_pinned_waits_then_refuses(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = group.engine
    monkeypatch.setattr(engine.slots, "wait_s", 0.1)
    holders = [engine.generate(Generation(f"holder-{n}", checks.prompt_of(n), Sampling(max_tokens=200),
                                          add(group, 250 + n))) for n in range(4)]
    for holder in holders:
        await holder.admit()
    with pytest.raises(SlotsExhausted) as refused:
        await generate(engine, checks.prompt_of(1), add(group, 260), max_tokens=2)
    assert status_of(refused.value) == 503
    # The same program shares a slot, and unsteered requests need none.
    assert len((await generate(engine, checks.prompt_of(1), add(group, 250), max_tokens=2))[0]) == 2
    assert len((await generate(engine, checks.prompt_of(1), max_tokens=2))[0]) == 2
    for holder in holders:
        await holder.cancel()
    assert engine.slots.num_pinned == 0
