"""Contrasts on a real engine against two plain Hugging Face passes for every token."""

import asyncio
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engines.data import LEAST_LOGPROB, Contrast, Generation, Sampling, Token, Touched
from server.engines.transformers.contrast import combine
from server.engines.transformers.steps import Steps
from steering.language.errors import EngineFailed, InvalidRequest, SteeringOverflow
from steering.programs.program import Program
from tests.engines import reference as ref
from tests.engines.cases import dense_cases, moe_cases
from tests.engines.conftest import MODEL, compiled, generate, ids
from tests.engines.test_batching import PROMPT, add

TOLERANCE = 1e-4
TOKENS = 10
NOTHING: tuple[list[dict[str, Any]], list[ref.Edit]] = ([], [])
DENSE, MOE = dense_cases(32, 56, 4, 12), moe_cases(32)
# Strong and weak spec, alpha and beta.
PAIRS: dict[str, list[tuple[Any, Any, float, float]]] = {
    "qwen3": [(DENSE[0], NOTHING, 0.1, 0.5), (NOTHING, DENSE[3], 0.1, 1.0), (DENSE[8], DENSE[0], 0.0, 2.0),
              (DENSE[1], DENSE[6], 0.5, 0.25), (DENSE[2], DENSE[9], 0.01, 4.0)],
    "qwen3_moe": [(NOTHING, MOE[0], 0.1, 0.5), (NOTHING, MOE[2], 0.1, 1.0), (MOE[5], MOE[4], 0.05, 0.5),
                  (NOTHING, MOE[8], 0.0, 2.0), (MOE[11], NOTHING, 0.1, 3.0)],
}
_names = itertools.count()


async def decode(engine: Any, prompt: list[int], program: Program | None, contrast: Contrast, **sampling: Any
                 ) -> tuple[list[Token], list[Touched], list[Touched]]:
    settings: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0.0, "logprobs": 5, **sampling}
    completion = engine.generate(Generation(f"contrast-{next(_names)}", prompt, Sampling(**settings), program,
                                            contrast=contrast))
    return [token async for token in completion], completion.touched(), completion.weak_touched()


async def gone(engine: Any) -> None:
    """A caller hears of a failure before the engine has let go of what failed."""
    async with asyncio.timeout(60):
        while engine.roster.completions or engine.roster.companions:
            await asyncio.sleep(0)


def program_of(engine: Any, spec: list[dict[str, Any]]) -> Program | None:
    return compiled(engine, *spec) if spec else None


def plain(model: Any, prompt: list[int], strong: Sequence[ref.Edit], weak: Sequence[ref.Edit], alpha: float,
          beta: float, count: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens and the log-probabilities that each is chosen by, written without a line of the engine."""
    found: list[int] = []
    rows = []
    for _ in range(count):
        so_far = prompt + found
        sure, other = (ref.logprobs(model, so_far, len(prompt), edits)[-1] for edits in (strong, weak))
        chances = sure.exp()
        score = torch.where(chances >= alpha * chances.max(), sure + beta * (sure - other), -torch.inf)
        rows.append(score.log_softmax(-1))
        found.append(int(score.argmax()))
    return found, rows


@pytest.mark.parametrize("family", PAIRS)
async def test_a_mixed_batch_of_contrasts_equals_two_plain_passes_a_token(start_engine: Any, model_dir: Any, family: str
                                                                          ) -> None:
    """Prefilled in chunks, beside requests without a contrast: untouched, and under the programs of the pairs."""
    engine = await start_engine(family, max_batch_tokens=24, max_requests=16)
    model = AutoModelForCausalLM.from_pretrained(model_dir(family), dtype=torch.float32).eval()
    prompts = [[3 + (i * 7 + 5 * t + t * t) % 90 for t in range(6 + 5 * i)] for i in range(len(PAIRS[family]))]
    asked = [decode(engine, prompt, program_of(engine, strong[0]),
                    Contrast(program_of(engine, weak[0]), alpha, beta))
             for prompt, (strong, weak, alpha, beta) in zip(prompts, PAIRS[family], strict=True)]
    beside = [generate(engine, prompt, program_of(engine, strong[0]), max_tokens=TOKENS)
              for prompt, (strong, *_) in zip(prompts, PAIRS[family], strict=True)]
    got, others = await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*beside))
    differ = 0
    for prompt, (strong, weak, alpha, beta), (tokens, _, _), (alone, _) in zip(prompts, PAIRS[family], got, others,
                                                                            strict=True):
        expected, rows = plain(model, prompt, strong[1], weak[1], alpha, beta, TOKENS)
        assert ids(tokens) == expected
        for token, row in zip(tokens, rows, strict=True):
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE * (1 + 2 * beta))
            for other, value in token.top_logprobs:
                wanted = float(row[other])
                assert value == pytest.approx(LEAST_LOGPROB if math.isinf(wanted) else wanted,
                                              abs=TOLERANCE * (1 + 2 * beta))
        # The neighbours are what they are alone, and the contrast shows.
        reference = plain(model, prompt, strong[1], strong[1], 0.0, 0.0, TOKENS)[0]
        assert ids(alone) == reference
        differ += ids(tokens) != reference
    assert differ >= 3, "the contrasts do not show in this test"


async def test_the_controls(start_engine: Any) -> None:
    """Two runs of one program are that program over its plausible tokens, and alpha 1 is greedy, whatever beta is."""
    engine = await start_engine("qwen3")
    for program in (None, compiled(engine, add(1))):
        alone, _ = await generate(engine, PROMPT, program)
        same, *_ = await decode(engine, PROMPT, program, Contrast(program, 0.1, 3.0), max_tokens=12)
        other, *_ = await decode(engine, PROMPT, program, Contrast(compiled(engine, add(2)), 1.0, 3.0), max_tokens=12)
        assert ids(same) == ids(alone) == ids(other)
        for token, whole in zip(same, alone, strict=True):
            share = math.log(sum(math.exp(value) for _, value in whole.top_logprobs
                                 if value >= whole.top_logprobs[0][1] + math.log(0.1)))
            if whole.top_logprobs[-1][1] < whole.top_logprobs[0][1] + math.log(0.1):
                # All plausible tokens are told, so their sum is.
                assert token.logprob == pytest.approx((whole.logprob or 0) - share, abs=1e-3)


def test_five_tokens_by_hand() -> None:
    strong = torch.tensor([[2.0, 1.5, 0.0, -1.0, -5.0]])
    weak = torch.tensor([[2.0, 0.0, 1.0, -9.0, 3.0]])
    alpha, beta = torch.tensor([[0.1]]), torch.tensor([[0.5]])
    # ln 0.1 is -2.3: of the five only the last two are further below the first. The fourth would have won with 3.
    inf = torch.inf
    assert combine(strong, weak, alpha, beta).tolist() == [[2.0, 2.25, -0.5, -inf, -inf]]
    assert combine(strong, weak, alpha * 0, beta).tolist() == [[2.0, 2.25, -0.5, 3.0, -9.0]]
    weak[0, 4] = inf
    assert bool(combine(strong, weak, alpha, beta).isnan().all()), "no number comes of one that is none"


async def test_sampled_alone_in_a_batch_again_and_resumed(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    contrast = Contrast(compiled(engine, add(2)), 0.02, 0.7)
    settings: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "top_k": 40, "frequency_penalty": 0.4,
                                "max_tokens": 16}
    program = compiled(engine, add(1))
    alone = (await decode(engine, PROMPT, program, contrast, seed=11, **settings))[0]
    crowd = await asyncio.gather(*(decode(engine, PROMPT, program, contrast, seed=seed, **settings)
                                   for seed in range(8, 14)), *(generate(engine, PROMPT) for _ in range(3)))
    assert ids(crowd[3][0]) == ids(alone)
    assert len({tuple(ids(one[0])) for one in crowd[:6]}) > 3
    resumed = engine.generate(Generation("resumed", PROMPT, Sampling(logprobs=5, seed=11, **settings), program,
                                         contrast=contrast, generated_ids=ids(alone)[:7]))
    assert [token.token_id async for token in resumed] == ids(alone)[7:]


async def test_lists_and_grammars_cut_before_the_plausible_tokens_are_chosen(start_engine: Any) -> None:
    """Otherwise nothing would be left where none of the plausible tokens is allowed."""
    engine = await start_engine("qwen3")
    contrast = Contrast(compiled(engine, add(1)), 0.9, 1.0)
    free = ids((await decode(engine, PROMPT, None, contrast))[0])
    allowed = tuple(token for token in range(40, 60) if token not in free)
    held = ids((await decode(engine, PROMPT, None, contrast, allowed_token_ids=allowed))[0])
    assert len(held) == TOKENS and set(held) <= set(allowed)
    ends = ids((await decode(engine, PROMPT, None, contrast, min_tokens=4, stop_token_ids=(free[0],)))[0])
    assert free[0] not in ends[:4]
    kept_out = ids((await decode(engine, PROMPT, None, contrast, bad_words=((free[0],),)))[0])
    assert free[0] not in kept_out


async def test_the_pair_ends_together_and_frees_all_it_holds(start_engine: Any) -> None:
    engine = await start_engine("qwen3", slots=2)
    first, second = compiled(engine, add(1)), compiled(engine, add(2))
    free = engine.stats()["kv_blocks_used"]
    tokens, touched, weak = await decode(engine, PROMPT[:7], first, Contrast(second, 0.1, 0.5))
    # The last token that was drawn is not fed back.
    assert len(tokens) == TOKENS and (touched, weak) == ([Touched(7, TOKENS - 1)], [Touched(7, TOKENS - 1)])
    stop = ids(tokens)[3]
    stopped, *_ = await decode(engine, PROMPT[:7], first, Contrast(second, 0.1, 0.5), stop_token_ids=(stop,))
    assert ids(stopped) == ids(tokens)[:ids(tokens).index(stop) + 1] and stopped[-1].finish_reason == "stop"
    long = engine.generate(Generation("long", PROMPT, Sampling(max_tokens=400, temperature=0.0, ignore_eos=True),
                                      first, contrast=Contrast(second, 0.1, 0.5)))
    async for _ in long:
        break
    await long.cancel()
    # Two other programs find slots, so those of the pair are free.
    await decode(engine, PROMPT[:7], compiled(engine, add(3)), Contrast(compiled(engine, add(4)), 0.1, 0.5))
    assert not engine.roster.completions and not engine.roster.companions
    assert engine.stats()["slots_used"] == 0
    tables = [table for allocator in engine.supervisor.manager.batch_processor.cache.cache_allocators.values()
              for table in allocator.block_table.values()]
    assert tables == [] and free == 0


async def test_pairs_through_two_slots_do_not_wait_for_each_other(start_engine: Any) -> None:
    engine = await start_engine("qwen3", slots=2, slot_wait_s=60)
    programs = [compiled(engine, add(n)) for n in range(8)]
    async with asyncio.timeout(60):
        got = await asyncio.gather(*(decode(engine, PROMPT[:7], programs[n], Contrast(programs[(n + 1) % 8], 0.1, 0.5),
                                            max_tokens=4) for n in range(8)))
    assert [len(tokens) for tokens, *_ in got] == [4] * 8
    single = await start_engine("qwen3", slots=1)
    with pytest.raises(InvalidRequest, match="two slots"):
        await decode(single, PROMPT, programs[0], Contrast(programs[1], 0.1, 0.5))
    assert len((await decode(single, PROMPT, programs[0], Contrast(None, 0.1, 0.5)))[0]) == TOKENS


async def test_the_cache_is_shared_where_both_runs_compute_the_same(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    late = compiled(engine, add(1, scope={"prompt": {"windows": [[20, None]]}}))
    matched = []
    for contrast in (Contrast(late, 0.1, 0.5),) * 2:
        completion = engine.generate(Generation(f"m{len(matched)}", PROMPT, Sampling(max_tokens=4, temperature=0.0),
                                                contrast=contrast))
        assert [token async for token in completion]
        matched.append(completion.cached())
    # 4 pages of 8 tokens can be found; those of the untouched run are found by anybody, and by the weak one up to 16.
    assert matched == [0, 32]
    await generate(engine, [*PROMPT[:24], 1, 2, 3], late)
    other = engine.generate(Generation("other", [*PROMPT[:24], 4, 5, 6], Sampling(max_tokens=2, temperature=0.0),
                                       compiled(engine, add(2)), contrast=Contrast(late, 0.1, 0.5)))
    assert [token async for token in other] and other.cached() == 0, "both begin where the first of them does"


async def test_thrown_out_of_a_full_cache_and_computed_again(start_engine: Any) -> None:
    roomy = await start_engine("qwen3")
    tight = await start_engine("qwen3", kv_cache_tokens=160, max_requests=8)
    prompts = [[7 + i + (5 * t) % 70 for t in range(12)] for i in range(6)]

    async def run(engine: Any) -> list[Any]:
        return await asyncio.gather(*(
            decode(engine, prompt, compiled(engine, add(i)), Contrast(compiled(engine, add(i + 1)), 0.1, 0.5),
                   max_tokens=40) for i, prompt in enumerate(prompts)),
            *(generate(engine, prompt, max_tokens=40) for prompt in prompts[:2]))

    resets = 0
    manager = tight.supervisor.manager.batch_processor.offloading_manager
    offload = manager.offload_requests

    def counting() -> Any:
        nonlocal resets
        resets += 1
        return offload()

    manager.offload_requests = counting
    async with asyncio.timeout(240):
        expected, got = await run(roomy), await run(tight)
    assert resets > 0, "the cache was large enough; the test shows nothing"
    assert [ids(one[0]) for one in got] == [ids(one[0]) for one in expected]
    assert [one[1:] for one in got] == [one[1:] for one in expected]
    assert tight.restarts()["restarting"] == 0
    with pytest.raises(InvalidRequest, match="fit"):
        await decode(tight, prompts[0], None, Contrast(compiled(tight, add(1)), 0.1, 0.5), max_tokens=100)
    assert len((await generate(tight, prompts[0], max_tokens=100))[0]) == 100


async def test_a_prompt_as_long_as_the_batch(start_engine: Any) -> None:
    engine = await start_engine("qwen3", max_batch_tokens=8, max_requests=8)
    alone = ids((await decode(engine, PROMPT[:8], None, Contrast(compiled(engine, add(1)), 0.1, 0.5)))[0])
    many = await asyncio.gather(*(decode(engine, PROMPT[:8], None, Contrast(compiled(engine, add(1)), 0.1, 0.5))
                                  for _ in range(8)))
    assert [ids(one[0]) for one in many] == [alone] * 8


async def test_what_overflows_in_the_weak_run_is_told_of_it(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    huge = compiled(engine, {"op": "add", "layers": [1], "inline": {"vector": [3e38] * 32}})
    neighbour = ids((await generate(engine, PROMPT))[0])
    failing = decode(engine, PROMPT, None, Contrast(huge, 0.1, 0.5))
    beside, failed = await asyncio.gather(generate(engine, PROMPT), failing, return_exceptions=True)
    assert isinstance(failed, SteeringOverflow) and failed.path == ("contrast", "weak", "interventions", 0)
    assert ids(beside[0]) == neighbour
    await gone(engine)


async def test_a_step_that_raises_is_tried_again_with_both(start_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start_engine("qwen3")
    weak = compiled(engine, add(1))
    expected = ids((await decode(engine, PROMPT, None, Contrast(weak, 0.1, 0.5)))[0])
    sample, calls = Steps._sample, itertools.count()

    def failing(self: Any, *args: Any) -> None:
        if next(calls) == 4:
            raise RuntimeError("once")
        sample(self, *args)

    manager = engine.supervisor.manager
    monkeypatch.setattr(manager.batch_processor.model_runner, "_sample", failing.__get__(engine.steps))
    assert ids((await decode(engine, PROMPT, None, Contrast(weak, 0.1, 0.5)))[0]) == expected
    monkeypatch.setattr(manager.batch_processor.model_runner, "_sample", lambda *_: (_ for _ in ()).throw(
        RuntimeError("always")))
    with pytest.raises(EngineFailed):
        await decode(engine, PROMPT, None, Contrast(weak, 0.1, 0.5))
    await gone(engine)


async def test_without_the_companions_pages_the_test_of_exactness_fails(start_engine: Any,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: companions that find the pages of their request compute another weak run."""
    engine = await start_engine("qwen3")
    weak = compiled(engine, add(1))
    expected = (await decode(engine, PROMPT, None, Contrast(weak, 0.0, 1.0)))[0]
    monkeypatch.setattr(Steps, "_salted", lambda self, request_id, token_ids: token_ids)
    wrong = await start_engine("qwen3")
    await generate(wrong, PROMPT)
    leaky = (await decode(wrong, PROMPT, None, Contrast(weak, 0.0, 1.0)))[0]
    assert abs((leaky[0].logprob or 0) - (expected[0].logprob or 0)) > 1e-2


async def test_over_http_whole_and_streamed_with_what_acted_in_both(serve: Any, model_dir: Any) -> None:
    """The same text whole and streamed, with stop texts and log-probabilities of the score, and beta 0 bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()
    prompt = PROMPT[:9]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 2,
            "return_token_ids": True, "seed": 5}
    strong, weak = DENSE[0], DENSE[3]
    spec = {"interventions": strong[0], "contrast": {"weak": {"interventions": weak[0]}, "alpha": 0.05, "beta": 1.0}}
    expected, rows = plain(model, prompt, strong[1], weak[1], 0.05, 1.0, TOKENS)
    async with serve(8) as (_, client):
        whole = (await client.post("/v1/completions", json={**body, "steering": spec})).json()
        choice = whole["choices"][0]
        assert choice["token_ids"] == expected
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(
            [float(row[token]) for row, token in zip(rows, expected, strict=True)], abs=1e-3)
        told = whole["steering"]["contrast"]
        assert [one["tokens"] for one in told["weak"]] == [{"prompt": 9, "generation": TOKENS - 1}]
        streamed = await client.post("/v1/completions", json={**body, "steering": spec, "stream": True})
        events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
        assert [token for event in events for one in event["choices"] for token in one["token_ids"]] == expected
        assert "".join(one["text"] for event in events for one in event["choices"]) == choice["text"]
        assert [one["tokens"] for one in events[-1]["steering"]["contrast"]["weak"]] == [
            {"prompt": 9, "generation": TOKENS - 1}]
        text = choice["text"]
        stop = text[len(text) // 2]
        cut = (await client.post("/v1/completions", json={**body, "steering": spec, "stop": [stop]})).json()
        assert cut["choices"][0]["text"] == text[:text.index(stop)]
        drawn = {**body, "temperature": 1.1, "n": 2}
        none = {**spec, "contrast": {**spec["contrast"], "beta": 0.0}}
        same = [(await client.post("/v1/completions", json={**drawn, "steering": one})).json()["choices"]
                for one in (none, {"interventions": strong[0]})]
        assert same[0] == same[1]
        huge = {"op": "add", "layers": [1], "inline": {"vector": [3e38] * 32}}
        answer = await client.post("/v1/completions", json={
            **body, "steering": {"contrast": {"weak": {"interventions": [huge]}}}})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "steering.contrast.weak.interventions[0]", answer.text
    async with serve(8, kv_cache_tokens=256) as (_, client):
        asked = {**body, "max_tokens": 200}
        assert (await client.post("/v1/completions", json=asked)).status_code == 200
        refused = await client.post("/v1/completions", json={**asked, "steering": spec})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens", refused.text
