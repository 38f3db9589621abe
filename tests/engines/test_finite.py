"""Values that are not finite stay with the request that made them.

Of every case two requests run in one batch, an innocent one and one at fault. The innocent one is held to what it gives
alone, the other to one typed error.
"""

import asyncio
import itertools
import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engines.data import CaptureRequest, CompareRequest, Generation, Sampling
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.finite import examining
from server.engines.transformers.running import Running
from server.engines.transformers.sampler import NO_TOKEN, sample
from server.requests.lens import Map, look
from steering.acting.containment import StepLimit
from steering.language.errors import ModelOverflow, SteeringLimit, SteeringOverflow, TrimtabError
from steering.programs.program import Program
from tests.engines.conftest import at_rest, compiled, generate, ids
from tests.tiny import tiny

NUMBERS = itertools.count()
PROMPT = [5 + (3 * t) % 80 for t in range(33)]
OTHER = [3 + (7 * t) % 80 for t in range(25)]
FIRST = [1.0] + [0.0] * 31
HUGE = {"float32": 3e38, "bfloat16": 3e38, "float16": 70_000.0}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": None}, "logprobs": {"logprobs": 3},
    "sampled": {"logprobs": None, "temperature": 1.0, "seed": 7, "top_p": 0.9}}


def push(strength: float, **fields: Any) -> dict[str, Any]:
    return {"op": "add", "inline": {"vector": FIRST}, "layers": [1], "strength": strength, **fields}


@asynccontextmanager
async def held(engine: TransformersEngine) -> AsyncIterator[None]:
    """Requests begun in the block come into one and the same step."""
    paused, over = threading.Event(), threading.Event()

    def hold() -> None:
        with engine.supervisor.manager.pause():  # type: ignore[union-attr]
            paused.set()
            over.wait(60)

    holding = asyncio.create_task(asyncio.to_thread(hold))
    await asyncio.to_thread(paused.wait, 60)
    try:
        yield
    finally:
        over.set()
        await holding


async def both(engine: TransformersEngine, program: Program | None, prompt: list[int] = PROMPT, *,
               length: int = 12, **sampling: Any) -> tuple[Any, Any]:
    """What the innocent request says and what becomes of the other one (of `length` tokens), in one batch."""
    completions = [engine.generate(Generation(f"both-{next(NUMBERS)}", tokens, Sampling(**{
        "max_tokens": most, "temperature": 0.0, "logprobs": 5, **sampling}), acting))
        for tokens, most, acting in ((OTHER, 12, None), (prompt, length, program))]

    async def read(completion: Any) -> Any:
        return [token async for token in completion], completion.touched()

    async with held(engine):
        for completion in completions:
            await completion.admit()
    return await asyncio.gather(*map(read, completions), return_exceptions=True)  # type: ignore[return-value]


def said(found: Any) -> list[int]:
    """The tokens, whose log-probabilities must be numbers if they were asked for."""
    assert not isinstance(found, BaseException), found
    assert all(token.logprob is None or math.isfinite(token.logprob) for token in found[0])
    return ids(found[0])


@pytest.mark.parametrize("dtype", HUGE)
async def test_an_overflow_stays_with_its_request(start_engine: Any, dtype: str) -> None:
    """Greedy, sampled and with log-probabilities; in the prompt and in the completion alone.

    The reference runs beside an untouched request that leaves the batch when the faulty one does, so that every number
    must be the same, bit for bit: in 16 bits the shape of a batch alone moves log-probabilities.
    """
    engine = await start_engine("qwen3", dtype=dtype, share_prefixes=False)
    everywhere = compiled(engine, push(HUGE[dtype]), push(HUGE[dtype]))
    later = compiled(engine, push(HUGE[dtype], scope={"prompt": "none", "generation": {"windows": [[4, None]]}}))
    for settings in WAYS.values():
        for program, position, length in ((everywhere, 0, 1), (later, len(PROMPT) + 4, 6)):
            reference, _ = await both(engine, None, length=length, **settings)
            innocent, faulty = await both(engine, program, **settings)
            assert innocent[0] == reference[0]
            assert len(said(innocent)) == 12
            if dtype == "float32":
                assert said(innocent) == said(await generate(engine, OTHER, **settings))
            assert isinstance(faulty, SteeringOverflow)
            assert faulty.param == "interventions[0]"
            assert f"resid_post of layer 1, token {position}" in faulty.message
    assert (await generate(engine, PROMPT))[0]


async def test_no_page_of_a_poisoned_step_is_reused(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    truth = {len(p): said(await generate(engine, p)) for p in (PROMPT, OTHER)}
    program = compiled(engine, push(3e38, scope={"prompt": {"windows": [[20, None]]}}))
    fresh = await start_engine("qwen3")
    innocent, faulty = await both(fresh, program)
    assert said(innocent) == truth[len(OTHER)]
    assert isinstance(faulty, SteeringOverflow)
    for prompt in (OTHER, PROMPT):
        assert said(await generate(fresh, prompt)) == truth[len(prompt)]
    with pytest.raises(SteeringOverflow):
        await generate(fresh, PROMPT, program)


async def test_what_overflows_behind_a_step_is_contained_and_named(start_engine: Any) -> None:
    """Both steps fit float16; the sum that the model makes of them does not."""
    engine = await start_engine("qwen3", dtype="float16", share_prefixes=False)
    program = compiled(engine, push(50_000.0, site="resid_pre"), push(60_000.0, site="attn_out"))
    reference, _ = await both(engine, None, length=1)
    innocent, faulty = await both(engine, program)
    assert innocent[0] == reference[0]
    assert isinstance(faulty, SteeringOverflow)
    assert faulty.param in ("interventions[0]", "interventions[1]")
    assert "drives the model to values that are not finite (layer 2, token 0)" in faulty.message
    with pytest.raises(SteeringOverflow, match="drives the model"):
        await engine.score(PROMPT, program)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "mixtral"])
async def test_other_families(start_engine: Any, family: str) -> None:
    """Scores that are capped, keys and values of a stream that no norm has bounded, experts."""
    engine = await start_engine(family, dtype="float16", share_prefixes=False)
    reference, _ = await both(engine, None, length=1)
    for items in ([push(70_000.0)], [push(50_000.0, site="resid_pre"), push(60_000.0, site="mlp_out")]):
        innocent, faulty = await both(engine, compiled(engine, *items))
        assert innocent[0] == reference[0]
        assert isinstance(faulty, SteeringOverflow)
        assert "token 0" in faulty.message


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that leaves float16 by itself on token 90, at the very beginning."""
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[:, 0] = 10_000.0
        model.transformer.wte.weight[90, 0] = 60_000.0
    path = tmp_path_factory.mktemp("fragile")
    model.save_pretrained(path)
    return path


async def test_the_models_own_overflow_is_contained_and_is_not_blamed_on_steering(start_engine: Any, fragile: Path
                                                                                  ) -> None:
    engine = await start_engine("gpt2", model=str(fragile), dtype="float16", share_prefixes=False)
    prompt = [*PROMPT, 90, 8]
    mild = compiled(engine, push(0.5))
    reference, _ = await both(engine, None, [*PROMPT, 9, 8], length=1)
    for program in (None, mild):
        innocent, faulty = await both(engine, program, prompt)
        assert innocent[0] == reference[0]
        assert isinstance(faulty, ModelOverflow)
        assert f"token {len(PROMPT)}" in faulty.message
        with pytest.raises(ModelOverflow):
            await engine.score(prompt, program)
    # Steered or not, what does not overflow is served.
    assert len((await generate(engine, PROMPT, mild))[0]) == 12
    with pytest.raises(ModelOverflow):
        await engine.capture([CaptureRequest(prompt, {"resid_post": [0]})])


LINE = {"basis": [[1.0] + [0.0] * 31], "mean": [0.0] * 32}
OPS: dict[str, dict[str, Any]] = {
    "norm_match": push(3e38, options={"norm_match": True}),
    "preserve_norm": push(3e38, options={"preserve_norm": True}),
    "ablate": {"op": "ablate", "inline": {"vector": FIRST}, "layers": [1], "strength": 3e38},
    "clamp": {"op": "clamp", "inline": {"vector": FIRST}, "layers": [1], "options": {"value": 3e38}},
    "affine": {"op": "affine", "inline": {"up": [FIRST], "down": [FIRST], "bias": [1e38]}, "layers": [1],
               "strength": 1e30},
    "diagonal": {"op": "affine", "inline": {"scale": [3e38] * 32, "shift": [3e38] * 32}, "layers": [1]},
    "sign_flip": {"op": "sign_flip", "inline": {"dims": [0, 1], "polarity": [1, -1]}, "layers": [1],
                  "options": {"mode": "flip"}, "strength": 3e38},
    "mask": {"op": "mask", "inline": {"dims": [0], "value": [3e38]}, "layers": [1], "options": {"mode": "set"}},
    "neuron_mask": {"op": "neuron_mask", "inline": {"neurons": [0, 1, 2]}, "layers": [1],
                    "options": {"mode": "scale", "scale": 3e38}},
    "head_mask": {"op": "head_mask", "inline": {"heads": [0]}, "layers": [1],
                  "options": {"mode": "scale", "scale": 3e38}},
    "manifold": {"op": "manifold", "inline": {**LINE, "knots": [[0.0], [1.0]], "points": [[0.0], [3e37]],
                                              "period": [0.0]}, "layers": [1], "options": {"target": 1}},
    "patch": {"op": "patch", "inline": {"vector": [3e38] * 32}, "layers": [1]},
    "gated": push(3e38), "expert_mask": {
        "op": "expert_mask", "inline": {"experts": [0, 1, 2, 3, 4, 5, 6, 7]}, "layers": [2], "strength": 3e35,
        "options": {"mode": "scale", "scale": 1000.0, "renormalise": False}},
}


async def test_every_op_contains_what_it_makes(start_engine: Any) -> None:
    """All of them at once, beside one innocent request."""
    engine = await start_engine("qwen3_moe")
    alone = said(await generate(engine, OTHER))
    programs = [compiled(engine, item) for item in OPS.values()]
    innocent, *faulty = await asyncio.gather(
        generate(engine, OTHER), *(generate(engine, [*PROMPT[:9], 10 + n], program)
                                   for n, program in enumerate(programs)), return_exceptions=True)
    assert said(innocent) == alone
    for name, found in zip(OPS, faulty, strict=True):
        # Giving every token its norm back undoes the strength, so that nothing overflows there.
        if name == "preserve_norm" and not isinstance(found, BaseException):
            continue
        assert isinstance(found, SteeringOverflow), (name, found)
        assert found.param == "interventions[0]", name
    assert said(await generate(engine, OTHER)) == alone


async def test_passes_beside_generation_raise_what_generation_does(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    program = compiled(engine, push(3e38))
    request = CompareRequest([*PROMPT, *OTHER], len(PROMPT), program)
    calls: list[Callable[[], Any]] = [
        lambda: engine.score(PROMPT, program), lambda: engine.next_logprobs([PROMPT, OTHER], program),
        lambda: engine.capture([CaptureRequest(PROMPT, {"resid_post": [2]})], program),
        lambda: engine.compare(request), lambda: engine.compare_all([request, request])]
    for call in calls:
        with pytest.raises(SteeringOverflow) as raised:
            await call()
        assert raised.value.param == "interventions[0]"
    assert bool((await engine.score(PROMPT)).logprobs[1:].isfinite().all())


async def test_a_step_over_the_limit_is_refused(start_engine: Any) -> None:
    engine = await start_engine("qwen3", step_limit=StepLimit(100.0))
    alone = await generate(engine, OTHER)
    innocent, faulty = await both(engine, compiled(engine, push(1.0), push(1e9)))
    assert said(innocent) == said(alone)
    assert isinstance(faulty, SteeringLimit)
    assert faulty.param == "interventions[1]"
    assert "allows 100" in faulty.message
    with pytest.raises(SteeringLimit):
        await engine.score(PROMPT, compiled(engine, push(1e9)))


async def test_a_step_over_the_limit_is_clipped(start_engine: Any) -> None:
    """A clipped step is one of the length that the limit allows: adding more changes nothing more."""
    engine = await start_engine("qwen3", step_limit=StepLimit(2.0, "clip"))
    (much, touched), (more, again) = [await generate(engine, PROMPT, compiled(engine, push(strength)))
                                      for strength in (1e6, 1e9)]
    assert ids(much) == ids(more)
    assert touched[0].clipped == again[0].clipped == touched[0].prompt + touched[0].generation
    assert again[0].largest_step > 1e6 > 100 > 2.0
    free = await start_engine("qwen3")
    matched = compiled(free, push(2.0, options={"norm_match": True}))
    exact, _ = await generate(free, PROMPT, matched)
    assert [(t.token_id, round(t.logprob, 3)) for t in much] == [(t.token_id, round(t.logprob, 3)) for t in exact]


async def test_a_comparison_is_not_refused_for_what_it_leaves_out(start_engine: Any) -> None:
    """The second step is within the limit only because of the first, which made the stream longer."""
    free = await start_engine("qwen3")
    captured = await free.capture([CaptureRequest([*PROMPT, *OTHER], {"resid_post": [1]})])
    norms = captured[0]["resid_post"][1].norm(dim=-1)
    first = 6 * float(norms.max())
    limit = 1.5 * first / float(norms.min())
    items = [push(first), push(1.5 * limit * float(norms.max()))]
    for action in ("refuse", "clip"):
        engine = await start_engine("qwen3", step_limit=StepLimit(limit, action))
        program = compiled(engine, *items)
        request = CompareRequest([*PROMPT, *OTHER], len(PROMPT), program)
        compared = await engine.compare(request)
        assert all(bool(part.kl.isfinite().all()) for part in compared.without)
    with pytest.raises(SteeringLimit):
        await (await start_engine("qwen3", step_limit=StepLimit(limit))).score(PROMPT, compiled(free, items[1]))


async def test_steps_are_measured_where_they_act(start_engine: Any) -> None:
    """Against the norms of the activations as captured, untouched."""
    engine = await start_engine("qwen3", share_prefixes=False)
    program = compiled(engine, push(3.0, scope={"prompt": "all", "generation": "none"}))
    _, touched = await generate(engine, PROMPT, program)
    captured = (await engine.capture([CaptureRequest(PROMPT, {"resid_post": [1]})]))[0]["resid_post"][1]
    steps = 3.0 / captured.norm(dim=-1)
    assert touched[0].largest_step == pytest.approx(float(steps.max()), rel=1e-4)
    assert touched[0].mean_step == pytest.approx(float(steps.mean()), rel=1e-4)


def test_one_row_fails_alone_in_the_sampler() -> None:
    """Rows that are not finite, and temperatures that overflow float32, beside a row that is drawn as it is alone."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    logits[1, 7], logits[2] = torch.nan, torch.inf

    def running(temperature: float) -> Running:
        return Running.build(Generation("r", [1, 2], Sampling(max_tokens=4, temperature=temperature, top_p=0.9)), 5)

    for temperature in (1.0, 0.0):
        alone = sample(logits[:1], [running(temperature)]).tolist()
        found = sample(logits, [running(temperature) for _ in range(3)] + [running(1e-40)]).tolist()
        assert found[0] == alone[0] >= 0
        assert found[1:3] == [NO_TOKEN, NO_TOKEN]
        assert found[3] == int(logits[3].argmax())


async def test_a_stream_of_faults_leaves_nothing_behind(start_engine: Any) -> None:
    """Slots, rows and pages of failed requests come free, and the engine goes on."""
    engine = await start_engine("qwen3", slots=2)
    for round_ in range(4):
        for strength in (3e38, 2.9e38, 2.8e38):
            with pytest.raises(TrimtabError):
                await generate(engine, PROMPT, compiled(engine, push(strength * (1 - 0.01 * round_))))
    assert len((await generate(engine, OTHER))[0]) == 12
    await at_rest(engine)
    assert not engine.roster.given_up and not engine.roster.completions


async def test_a_fault_in_a_chunk_that_predicts_nothing(start_engine: Any) -> None:
    """No token is drawn in the step at fault, and the innocent request is in the middle of its own prompt."""
    engine = await start_engine("qwen3", max_batch_tokens=16, share_prefixes=False)
    alone = said(await generate(engine, OTHER))
    for position in (2, 20):
        program = compiled(engine, push(3e38, scope={"prompt": {"positions": [position]}, "generation": "none"}))
        innocent, faulty = await both(engine, program)
        assert said(innocent) == alone
        assert isinstance(faulty, SteeringOverflow)
        assert f"token {position}" in faulty.message


async def test_lenses_raise_and_are_not_limited(start_engine: Any) -> None:
    engine = await start_engine("qwen3", step_limit=StepLimit(1e-3))
    free = await start_engine("qwen3")
    # A lens puts activations in the place of others, however far apart they are.
    seen, expected = [await look(one, PROMPT, [0, 2], [-1, 3], None, None, read=list) for one in (engine, free)]
    for layer in (0, 2):
        torch.testing.assert_close(torch.stack(list(seen.layers[layer])), torch.stack(list(expected.layers[layer])))
    with pytest.raises(SteeringOverflow) as raised:
        await look(free, PROMPT, [2], [-1], compiled(free, push(3e38)), None, read=list)
    assert raised.value.param == "interventions[0]"
    tuned = Map("tuned@1", {0: {"scale": torch.full((32,), 3e38), "shift": torch.full((32,), 3e38)}})
    with pytest.raises(SteeringOverflow, match="tuned@1") as raised:
        await look(free, PROMPT, [0], [-1], None, tuned, read=list)
    assert raised.value.param == "lens"


def test_an_examined_cache_gives_zeros_and_names_tokens_and_owners() -> None:
    """Two requests, of 2 and 3 entries in the cache, of which the last of each is new."""
    class Cache:
        def __init__(self) -> None:
            self.kept = {"key": torch.ones(1, 2, 5, 4), "value": torch.ones(1, 2, 5, 4)}
            self.kept["value"][0, 1, 2, 3] = torch.nan

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
                   ) -> tuple[torch.Tensor, torch.Tensor]:
            for name, states in (("key", key_states), ("value", value_states)):
                self.kept[name][:, :, [1, 4]] = states
            return self.kept["key"], self.kept["value"]

    cache = Cache()
    new = torch.full((1, 2, 2, 4), 2.0)
    broken = new.clone()
    broken[0, 0, 0, 0] = torch.inf
    with examining(cache) as found:
        for layer, keys in ((3, new), (4, broken), (5, broken)):
            keys, values = cache.update(keys, new, layer, {"cu_seq_lens_k": torch.tensor([0, 2, 5])})
            assert bool(keys.isfinite().all() and values.isfinite().all())
    assert found.tokens == {0: 4}
    # An old entry of the second request, its first one.
    assert found.cached == {1: (3, 0)}
    assert keys[0, :, 1].eq(0).all() and values[0, :, 1].eq(0).all()
    assert values[0, :, 2].eq(0).all() and values[0, :, 3].eq(1).all() and keys[0, :, 4].eq(2).all()
    assert cache.update.__func__ is Cache.update  # type: ignore[attr-defined]


async def test_the_self_test_passes_under_a_small_limit(start_engine: Any) -> None:
    for limit in (StepLimit(0.05), StepLimit(0.05, "clip")):
        engine = await start_engine("qwen3", self_test=True, step_limit=limit)
        assert engine.selftest is not None and not engine.selftest.missed
