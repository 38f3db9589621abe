"""Batching must not show: chunks, preemption, shared prefixes, cancellation, slots, seeds."""

import asyncio
from typing import Any

import pytest
import torch

from server.engines.data import Generation, Sampling
from server.engines.transformers import attention
from server.engines.transformers.running import Running, SaltedIds
from server.engines.transformers.steps import Steps
from server.errors import status_of
from steering.language.errors import EngineUnavailable, InvalidRequest, InvalidSpec, SlotsExhausted, UnsupportedModel
from tests.engines.conftest import at_rest, compiled, generate, ids

PROMPT = [5 + (3 * t) % 80 for t in range(33)]


def vector(seed: int, scale: float = 3.0) -> list[float]:
    return (torch.randn(32, generator=torch.Generator().manual_seed(seed)) * scale).tolist()


def add(seed: int, **fields: Any) -> dict[str, Any]:
    return {"op": "add", "layers": [1], "inline": {"vector": vector(seed)}, **fields}


async def test_prompt_programs_share_prefixes_only_with_equals(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    first, second = compiled(engine, add(1)), compiled(engine, add(2))
    late = compiled(engine, add(1, scope={"prompt": {"windows": [[20, None]]}}))
    matched: list[tuple[str, int]] = []
    cache = engine.supervisor.manager.batch_processor.cache
    search = cache.search_prefix_match

    def recording(request_id: str, prompt_ids: list[int]) -> int:
        matched.append((request_id, search(request_id, prompt_ids)))
        return matched[-1][1]

    cache.search_prefix_match = recording
    for program in (None, None, first, first, second, late, late):
        await generate(engine, PROMPT, program)
    # Pages hold 8 tokens and the last prompt token is never matched: 4 pages of the 33 tokens can be.
    # The late program is untouched up to position 20: two pages are those of the unsteered requests.
    assert [n for _, n in matched] == [0, 32, 0, 32, 0, 16, 32]


async def test_a_completion_tells_how_much_of_its_prompt_was_cached(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    steered = compiled(engine, add(1))
    told = []
    for n, program in enumerate((None, None, steered, steered)):
        completion = engine.generate(Generation(f"r{n}", PROMPT, Sampling(max_tokens=2, temperature=0.0), program))
        assert [token async for token in completion]
        told.append(completion.cached())
    assert told == [0, 32, 0, 32]


async def test_a_request_of_one_step_leaves_its_pages_to_the_next(start_engine: Any) -> None:
    """As passes over texts are that differ in their ends alone."""
    engine = await start_engine("qwen3")
    steered = compiled(engine, add(1))
    told = []
    for n, (end, program) in enumerate(((1, None), (2, None), (3, steered), (4, steered), (5, None))):
        completion = engine.generate(Generation(f"r{n}", [*PROMPT, end], Sampling(max_tokens=1, temperature=0.0),
                                                program))
        assert [token async for token in completion]
        told.append(completion.cached())
    assert told == [0, 32, 0, 32, 32]


async def test_without_the_salt_steered_prefixes_leak(start_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the cache test above can fail."""
    honest = await start_engine("qwen3")
    truth, _ = await generate(honest, PROMPT)
    monkeypatch.setattr(Steps, "_salted", lambda self, request_id, token_ids: token_ids)
    leaky = await start_engine("qwen3")
    await generate(leaky, PROMPT, compiled(leaky, add(1)))
    poisoned, _ = await generate(leaky, PROMPT)
    assert abs(poisoned[0].logprob - truth[0].logprob) > 1e-2


async def test_preemption_with_recompute(start_engine: Any) -> None:
    """A cache far too small for all: requests are thrown out and prefilled again with their own tokens."""
    roomy = await start_engine("qwen3")
    tight = await start_engine("qwen3", kv_cache_tokens=96, max_requests=8)
    scopes: list[dict[str, Any]] = [{"prompt": "none"}, {"generation": "none"}, {"prompt": {"positions": [-1]}},
                                    {"generation": {"windows": [[3, 9]]}}, {}, {"generation": {"positions": [0, 5]}}]
    prompts = [[7 + i + (5 * t) % 70 for t in range(12)] for i in range(6)]

    async def run(engine: Any) -> list[Any]:
        programs = [compiled(engine, add(i, scope=scope)) for i, scope in enumerate(scopes)]
        return await asyncio.gather(*(generate(engine, prompt, program, max_tokens=40)
                                      for prompt, program in zip(prompts, programs, strict=True)))

    resets = 0
    manager = tight.supervisor.manager.batch_processor.offloading_manager
    offload = manager.offload_requests

    def counting() -> Any:
        nonlocal resets
        resets += 1
        return offload()

    manager.offload_requests = counting
    expected, got = await run(roomy), await run(tight)
    assert resets > 0, "the cache was large enough; the test shows nothing"
    for (a, touched_a), (b, touched_b) in zip(expected, got, strict=True):
        assert ids(a) == ids(b)
        assert touched_a == touched_b
        for x, y in zip(a, b, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4)


async def test_rules_by_generated_token_id(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    plain, _ = await generate(engine, PROMPT, max_tokens=20)
    trigger = ids(plain)[3]
    program = compiled(engine, add(1, scope={"prompt": "none", "generation": {"token_ids": [trigger]}}))
    steered, touched = await generate(engine, PROMPT, program, max_tokens=20)
    where = [i for i, token in enumerate(ids(steered)[:-1]) if token == trigger]
    assert where and ids(steered)[:where[0] + 1] == ids(plain)[:where[0] + 1]
    assert (touched[0].prompt, touched[0].generation) == (0, len(where))
    scores = await engine.score(PROMPT + ids(steered), program, prompt_length=len(PROMPT))
    assert scores.logprobs[len(PROMPT):].tolist() == pytest.approx([t.logprob for t in steered], abs=1e-4)


async def test_roles_pick_the_prompt_tokens_of_a_turn(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    roles = ["system"] * 10 + ["user"] * 15 + ["assistant"] * 8
    program = compiled(engine, add(1, scope={"prompt": {"roles": ["user"]}, "generation": "none"}))
    windowed = compiled(engine, add(1, scope={"prompt": {"windows": [[10, 25]]}, "generation": "none"}))
    by_role, touched = await generate(engine, PROMPT, program, roles=roles)
    by_window, _ = await generate(engine, PROMPT, windowed)
    assert touched[0].prompt == 15
    assert [t.logprob for t in by_role] == pytest.approx([t.logprob for t in by_window], abs=1e-5)
    with pytest.raises(InvalidSpec, match="no chat roles"):
        engine.generate(Generation("no-roles", PROMPT, Sampling(max_tokens=2), program))


async def test_cancellation_frees_slot_and_cache(start_engine: Any) -> None:
    engine = await start_engine("qwen3", slots=1)
    completion = engine.generate(Generation("long", PROMPT, Sampling(max_tokens=400, temperature=0.0, ignore_eos=True),
                                            compiled(engine, add(1))))
    async for _ in completion:
        break
    await completion.cancel()
    # Another program can have the only slot, without waiting for 400 tokens.
    tokens, _ = await generate(engine, PROMPT, compiled(engine, add(2)), max_tokens=3)
    assert len(tokens) == 3
    await at_rest(engine)
    assert not engine.roster.completions


async def test_a_client_that_leaves_while_waiting_gets_no_slot(start_engine: Any) -> None:
    engine = await start_engine("qwen3", slots=1, slot_wait_s=60)
    holder = engine.generate(Generation("holder", PROMPT, Sampling(max_tokens=400, ignore_eos=True),
                                        compiled(engine, add(1))))
    await anext(aiter(holder))
    waiting = engine.generate(Generation("waiting", PROMPT, Sampling(max_tokens=400), compiled(engine, add(2))))
    reading = asyncio.ensure_future(anext(aiter(waiting)))
    while not engine.slots.num_waiting:
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await waiting.cancel()
    await holder.cancel()
    # The slot comes free and goes to the next that asks, not to the one that left.
    tokens, _ = await generate(engine, PROMPT, compiled(engine, add(3)), max_tokens=3)
    assert len(tokens) == 3 and not engine.roster.completions and not engine.slots.num_waiting


async def test_all_slots_pinned_waits_then_refuses(start_engine: Any) -> None:
    engine = await start_engine("qwen3", slots=1, slot_wait_s=0.05)
    holder = engine.generate(Generation("holder", PROMPT, Sampling(max_tokens=400, ignore_eos=True),
                                        compiled(engine, add(1))))
    stream = aiter(holder)
    await anext(stream)
    with pytest.raises(SlotsExhausted) as refused:
        await generate(engine, PROMPT, compiled(engine, add(2)), max_tokens=2)
    assert status_of(refused.value) == 503
    # The same program shares the slot, and unsteered requests need none.
    assert len((await generate(engine, PROMPT, compiled(engine, add(1)), max_tokens=2))[0]) == 2
    assert len((await generate(engine, PROMPT, max_tokens=2))[0]) == 2
    await holder.cancel()


async def test_many_programs_through_few_slots(start_engine: Any) -> None:
    """60 distinct programs over 3 slots, all at once: each gets what it gets alone, and device memory stays flat."""
    engine = await start_engine("qwen3", slots=3, slot_wait_s=60)
    reference = await start_engine("qwen3", slots=60)
    programs = [compiled(engine, add(i)) for i in range(60)]
    got = await asyncio.gather(*(generate(engine, PROMPT[:9], p, max_tokens=5) for p in programs))
    expected = [await generate(reference, PROMPT[:9], p, max_tokens=5) for p in programs]
    assert [ids(tokens) for tokens, _ in got] == [ids(tokens) for tokens, _ in expected]
    held = engine.rows.nbytes
    await asyncio.gather(*(generate(engine, PROMPT[:9], p, max_tokens=2) for p in programs))
    assert engine.rows.nbytes == held


async def test_seeded_draws_do_not_depend_on_the_batch(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    settings = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_tokens": 16}
    alone = ids((await generate(engine, PROMPT, seed=11, **settings))[0])
    crowd = await asyncio.gather(*(generate(engine, PROMPT, seed=seed, **settings) for seed in range(8, 16)))
    assert ids(crowd[3][0]) == alone
    assert len({tuple(ids(tokens)) for tokens, _ in crowd}) == 8


async def test_stop_token_and_length(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    tokens, _ = await generate(engine, PROMPT, max_tokens=10)
    assert [t.finish_reason for t in tokens] == [None] * 9 + ["length"]
    stop = ids(tokens)[4]
    first = ids(tokens).index(stop)
    stopped, _ = await generate(engine, PROMPT, max_tokens=10, stop_token_ids=(stop,))
    assert ids(stopped) == ids(tokens)[:first + 1] and stopped[-1].finish_reason == "stop"
    ignored, _ = await generate(engine, PROMPT, max_tokens=10, stop_token_ids=(stop,), ignore_eos=True)
    assert ids(ignored) == ids(tokens)


async def test_capture_equals_hidden_states_and_is_after_the_program(start_engine: Any, model_dir: Any) -> None:
    from server.engines.data import CaptureRequest

    engine = await start_engine("qwen3")
    prompts = [PROMPT, PROMPT[:7], PROMPT[3:20]]
    requests = [CaptureRequest(p, {"resid_post": [0, 1], "resid_pre": [2]}, positions=[0, -1]) for p in prompts]
    plain = await engine.capture(requests)
    v = torch.tensor(vector(1))
    steered = await engine.capture(requests, compiled(engine, add(1)))
    for prompt, captured, after in zip(prompts, plain, steered, strict=True):
        hidden = engine.model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for layer in (0, 1):
            expected = hidden[layer + 1][0, [0, -1]].detach()
            assert torch.allclose(captured["resid_post"][layer], expected, atol=1e-5)
        assert torch.allclose(after["resid_post"][1], captured["resid_post"][1] + v, atol=1e-4)
        assert torch.allclose(after["resid_pre"][2], captured["resid_pre"][2] + v, atol=1e-4)


@pytest.mark.parametrize(("prompt", "sampling"), [
    ([], {}), ([-1], {}), ([97], {}), ([1] * 513, {}), ([1] * 500, {"max_tokens": 20}), ([1], {"max_tokens": 0}),
])
async def test_what_does_not_fit_is_refused(start_engine: Any, prompt: list[int], sampling: dict[str, Any]) -> None:
    engine = await start_engine("qwen3")
    with pytest.raises(InvalidRequest):
        engine.generate(Generation("bad", prompt, Sampling(**{"max_tokens": 4, **sampling})))


async def test_stopped_engine_says_so(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    await engine.stop()
    assert not engine.alive
    with pytest.raises(EngineUnavailable):
        engine.generate(Generation("late", PROMPT, Sampling(max_tokens=4)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "phi3", "olmo2", "mixtral", "olmoe",
                                    "mistral", "qwen2", "gemma3_text", "qwen2_moe"])
async def test_families_start_with_self_test(start_engine: Any, family: str) -> None:
    """The self-test reaches every offered site, and the canary compares the batching loop with a plain pass."""
    engine = await start_engine(family, self_test=True)
    assert engine.selftest is not None and not engine.selftest.missed
    assert engine.capabilities()["sites"]["resid_post"]["layers"] == [0, 1, 2]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
async def test_what_the_batching_loop_cannot_run_is_refused_at_start(start_engine: Any, family: str,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the refusal by name, which is taken away here."""
    monkeypatch.setattr(attention, "check_attention", lambda model: None)
    with pytest.raises(UnsupportedModel, match="continuous batching cannot run"):
        await start_engine(family, self_test=True)


def test_salted_pages_differ_only_where_touched() -> None:
    from steering.language.scope import Scope
    from steering.ops.base import Row
    from steering.programs.program import Applied, Compiled, Program

    scope = Scope.model_validate({"prompt": {"windows": [[10, 12]]}, "generation": "none"})
    rows = {("resid_post", 0): Row("add", {"delta": torch.ones(4)})}
    program = Program((Compiled("add", scope, rows, Applied(None, "add", (), (), {}, {})),))
    running = Running.build(Generation("x", PROMPT, Sampling(max_tokens=4), program), seed=0)
    salted = SaltedIds(PROMPT, running)
    assert salted[0:8] == PROMPT[0:8] and salted[16:24] == PROMPT[16:24]
    assert salted[8:16][:8] == PROMPT[8:16] and len(salted[8:16]) > 8
    assert len(salted) == len(PROMPT)
