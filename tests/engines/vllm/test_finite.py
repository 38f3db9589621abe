"""Values that are not finite stay with the request that made them, in the graph and in the opaque op.

A compiled engine with a cache of 12 blocks, so that what a faulty request leaves behind is soon another's.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from server.engines.data import CaptureRequest, CompareRequest, Generation, Sampling
from server.engines.vllm.host import serving as serving_module
from server.errors import status_of
from steering.acting.containment import StepLimit
from steering.language.errors import ProgramLost, SteeringLimit, SteeringOverflow
from steering.programs.program import Program
from tests.engines.cases import vector
from tests.engines.conftest import compiled, generate, ids
from tests.engines.vllm import checks
from tests.engines.vllm.apps import Running, client_of, make_app
from tests.engines.vllm.conftest import ONE_PROCESS, TIGHT, Group, running
from tests.engines.vllm.same import CHAT, TURNS

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
# In the graph, and left to the opaque op. A step of 10 000 norms is far beyond what anything here takes.
SITES = ("resid_post", "resid_pre", "head_out", "mlp_act", "attn_out", "mlp_out")
LIMIT = 10_000.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group() -> AsyncIterator[Group]:
    async with running("lab-dense", graph_ops="all", slots=8, step_limit=StepLimit(LIMIT), **TIGHT, **ONE_PROCESS
                       ) as started:
        yield started


def push(group: Group, strength: float, site: str = "resid_post", **fields: Any) -> dict[str, Any]:
    facts = group.engine.facts
    width = {"mlp_act": facts.d_ff, "head_out": facts.num_heads * facts.head_dim}.get(site, facts.d_model)
    return {"op": "add", "site": site, "layers": [2], "strength": strength,
            "inline": {"vector": [1.0] + [0.0] * (width - 1)}, **fields}


def said(tokens: Any) -> list[tuple[int, Any]]:
    return [(token.token_id, token.logprob) for token in tokens]


async def both(group: Group, program: Program, prompt: list[int], **sampling: Any) -> tuple[Any, Any]:
    """What an innocent request says and what becomes of the other one, in one batch."""
    settings = {"max_tokens": 12, "logprobs": 2, **sampling}
    found = await asyncio.gather(generate(group.engine, checks.prompt_of(2), **settings),
                                 generate(group.engine, prompt, program, **settings), return_exceptions=True)
    return found[0], found[1]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("sampling", [{}, {"logprobs": None}, {"temperature": 1.0, "seed": 5}], ids=str)
async def test_an_overflow_stays_with_its_request(group: Group, site: str, sampling: dict[str, Any]) -> None:
    """In a prompt that comes in chunks and in the completion alone; two interventions, of which the second one is at
    fault."""
    prompt = checks.prompt_of(3, 80)
    alone = ids((await generate(group.engine, checks.prompt_of(2), **{"max_tokens": 12, "logprobs": 2, **sampling}))[0])
    for scope, position in (({"prompt": {"windows": [[70, None]]}}, 70),
                            ({"prompt": "none", "generation": {"windows": [[3, None]]}}, 83)):
        program = compiled(group.engine, push(group, 1.0, scope=scope), push(group, 3e38, site, scope=scope))
        innocent, faulty = await both(group, program, prompt, **sampling)
        assert not isinstance(innocent, BaseException), innocent
        assert ids(innocent[0]) == alone
        if "logprobs" not in sampling:
            checks.check_tokens(group, checks.prompt_of(2), innocent[0], [], steered=False, greedy=not sampling)
        assert isinstance(faulty, SteeringOverflow), faulty
        assert faulty.param == "interventions[1]"
        assert f"{site} of layer 2, token {position}" in faulty.message
    assert group.engine.alive and group.engine.slots.num_pinned == 0 and not group.engine.connection.running


async def test_what_a_faulty_request_leaves_in_the_cache_is_nobodys(group: Group) -> None:
    """Its own prompt again, steered and not, and strangers who get its blocks."""
    prompt = checks.prompt_of(4, 90)
    scope = {"prompt": {"windows": [[40, None]]}}
    faulty, mild = (compiled(group.engine, push(group, strength, scope=scope)) for strength in (3e38, 3.0))
    expected = {}
    for name, program in (("plain", None), ("mild", mild)):
        expected[name] = said((await generate(group.engine, checks.prompt_of(5, 90), program, max_tokens=4))[0])
    # Choices of one request: the second finds the first one's blocks in the cache, in the very same step.
    for found in await asyncio.gather(*(generate(group.engine, prompt, faulty, max_tokens=6, temperature=1.0, seed=n)
                                        for n in range(3)), return_exceptions=True):
        # Of a choice that took the first chunk from another one, the first token of its own is named.
        assert isinstance(found, SteeringOverflow) and found.message.endswith(("token 40)", "token 64)")), found
    before = checks.metric(group.engine, "prefix_cache_hits")
    with pytest.raises(SteeringOverflow, match="token 40"):
        await generate(group.engine, prompt, faulty, max_tokens=4)
    assert checks.metric(group.engine, "prefix_cache_hits") - before <= 32, "only the block before the fault"
    for n in range(6):
        # Ten blocks at a time: every block of the faulty ones comes round.
        given = checks.prompt_of(20 + n, 70)
        tokens, _ = await generate(group.engine, given, max_tokens=4)
        checks.check_tokens(group, given, tokens, [], steered=False)
    for name, program in (("plain", None), ("mild", mild)):
        assert ids((await generate(group.engine, checks.prompt_of(5, 90), program, max_tokens=4))[0]) == [
            token for token, _ in expected[name]]


async def test_passes_beside_generation_raise_what_generation_does(group: Group) -> None:
    engine, prompt = group.engine, checks.prompt_of(3)
    program = compiled(engine, push(group, 3e38))
    request = CompareRequest([*prompt, *checks.prompt_of(1)], len(prompt), program)
    for call in (engine.score(prompt, program), engine.next_logprobs([prompt, checks.prompt_of(1)], program),
                 engine.capture([CaptureRequest(prompt, {"resid_post": [2]})], program),
                 engine.compare(request), engine.compare_all([request, request])):
        with pytest.raises(SteeringOverflow, match="resid_post of layer 2") as raised:
            await call
        assert raised.value.param == "interventions[0]"
    assert bool((await engine.score(prompt)).logprobs[1:].isfinite().all())


async def test_a_step_over_the_limit_is_refused(group: Group) -> None:
    program = compiled(group.engine, push(group, 1.0), push(group, 1e9))
    innocent, faulty = await both(group, program, checks.prompt_of(3))
    assert not isinstance(innocent, BaseException)
    assert isinstance(faulty, SteeringLimit) and faulty.param == "interventions[1]"
    assert "allows 10000" in faulty.message


async def test_a_comparison_is_not_refused_for_what_it_leaves_out(group: Group) -> None:
    """The second step is within the limit only because of the first, which made the stream longer."""
    engine, prompt = group.engine, checks.prompt_of(3)
    token_ids = [*prompt, *checks.prompt_of(1)]
    captured = await engine.capture([CaptureRequest(token_ids, {"resid_post": [2]})])
    longest = float(captured[0]["resid_post"][2].norm(dim=-1).max())
    program = compiled(engine, push(group, 6 * longest), push(group, 1.5 * LIMIT * longest))
    compared = await engine.compare(CompareRequest(token_ids, len(prompt), program))
    assert len(compared.without) == 2 and all(bool(part.kl.isfinite().all()) for part in compared.without)
    with pytest.raises(SteeringLimit):
        await engine.score(prompt, compiled(engine, push(group, 1.5 * LIMIT * longest)))


@pytest.mark.parametrize("site", SITES)
async def test_steps_are_measured_where_they_act(group: Group, site: str) -> None:
    """Against the norms of the activations as captured untouched, one layer; prompts in chunks, and thrown-out tokens
    count once."""
    prompt = checks.prompt_of(6, 75)
    program = compiled(group.engine, push(group, 3.0, site, scope={"prompt": "all", "generation": "none"}))
    _, touched = await generate(group.engine, prompt, program, max_tokens=3)
    captured = (await group.engine.capture([CaptureRequest(prompt, {site: [2]})]))[0][site][2]
    steps = 3.0 / captured.norm(dim=-1)
    assert touched[0].prompt == 75
    assert touched[0].largest_step == pytest.approx(float(steps.max()), rel=1e-3)
    assert touched[0].mean_step == pytest.approx(float(steps.mean()), rel=1e-3)


async def test_a_completion_that_is_left_early_still_tells_its_steps(group: Group) -> None:
    engine = group.engine
    completion = engine.generate(Generation("left", checks.prompt_of(1), Sampling(max_tokens=60, temperature=0.0),
                                            compiled(engine, push(group, 2.0))))
    async for _ in completion:
        break
    await completion.cancel()
    assert (completion.touched()[0].largest_step or 0) > 0
    assert engine.slots.num_pinned == 0


async def test_another_program_in_the_slot_ends_the_request_and_not_the_engine(group: Group,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is made to believe that a slot holds what it does not."""
    program, other = (compiled(group.engine, push(group, strength)) for strength in (2.0, 2.5))
    honest = serving_module.extra_of

    def confused(given: Program | None, *args: Any) -> dict[str, Any]:
        extra = honest(given, *args)
        return extra | {"digest": "another"} if given is not None and given.digest == program.digest else extra

    monkeypatch.setattr(serving_module, "extra_of", confused)
    before = said((await generate(group.engine, checks.prompt_of(1), other, max_tokens=6))[0])
    lost, beside = await asyncio.gather(
        generate(group.engine, checks.prompt_of(1, 70), program, max_tokens=6),
        generate(group.engine, checks.prompt_of(1), other, max_tokens=6), return_exceptions=True)
    assert isinstance(lost, ProgramLost) and status_of(lost) == 503 and lost.retry_after_s
    assert not isinstance(beside, BaseException) and ids(beside[0]) == [token for token, _ in before]
    monkeypatch.undo()
    # It is placed anew, and what the lost request left in the cache is not taken for it.
    tokens, _ = await generate(group.engine, checks.prompt_of(1, 70), program, max_tokens=6)
    assert len(tokens) == 6 and group.engine.alive and group.engine.slots.num_pinned == 0


async def test_over_http_an_overflow_is_one_typed_error(group: Group, tmp_path: Path) -> None:
    """Whole, streamed, with log-probabilities, with a report and with a guard; before and after the first token."""
    app = make_app(group.name, Running(group.engine), "vllm", tmp_path)
    late = {"prompt": "none", "generation": {"windows": [[4, None]]}}
    async with client_of(app) as client:
        for scope in ({}, late):
            for more in ({}, {"logprobs": True, "top_logprobs": 2}, {"temperature": 1.0, "seed": 3}, {"n": 2}):
                for steering in ({}, {"report": "tokens"}, {"guard": {"max_kl": 50.0, "every": 4}}):
                    for stream in (False, True):
                        body = {"model": group.name, "messages": TURNS, "max_tokens": 12, "stream": stream,
                                "ignore_eos": True, "temperature": 0.0, **more,
                                "steering": {"interventions": [push(group, 3e38, scope=scope)], **steering}}
                        response = await client.post(CHAT, json=body)
                        if stream and scope:
                            events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
                            assert '"steering_overflow"' in events[-2] and events[-1] == "[DONE]", response.text
                            continue
                        assert response.status_code == 400, response.text
                        error = response.json()["error"]
                        assert (error["code"], error["param"]) == ("steering_overflow", "steering.interventions[0]")
        plain = await client.post(CHAT, json={"model": group.name, "messages": TURNS, "max_tokens": 4})
        assert plain.status_code == 200


HALF = 70_000.0


async def test_what_overflows_behind_a_step_is_named_in_float16() -> None:
    """Both steps fit float16; the sum that the model makes of them does not."""
    async with running("lab-dense", eager=True, dtype="float16", self_test=False, slots=4, **TIGHT, **ONE_PROCESS
                       ) as group:
        alone = ids((await generate(group.engine, checks.prompt_of(2), logprobs=None))[0])
        twice = compiled(group.engine, push(group, 50_000.0, layers=[1]), push(group, 50_000.0, "attn_out"))
        innocent, faulty = await both(group, twice, checks.prompt_of(3, 70), logprobs=None)
        assert ids(innocent[0]) == alone
        assert isinstance(faulty, SteeringOverflow) and "drives the model" in faulty.message, faulty
        with pytest.raises(SteeringOverflow, match="drives the model"):
            await group.engine.score(checks.prompt_of(3), twice)
        for site in ("resid_post", "attn_out"):
            with pytest.raises(SteeringOverflow, match=f"{site} of layer 2, token 0"):
                await generate(group.engine, checks.prompt_of(4), compiled(group.engine, push(group, HALF, site)))
        # Blocks with values that are no numbers come round.
        for n in range(6):
            given = checks.prompt_of(20 + n, 70)
            first, _ = await generate(group.engine, given, max_tokens=4, logprobs=1)
            assert all(token.logprob is not None and token.logprob > -50 for token in first)


async def test_a_clipped_step_is_as_long_as_the_limit_says() -> None:
    """Adding more changes nothing more, and the numbers say what was asked for. In the graph and beside it."""
    limit = StepLimit(2.0, "clip")
    async with running("lab-dense", graph_ops="all", slots=8, step_limit=limit, **TIGHT, **ONE_PROCESS) as group:
        engine, prompt = group.engine, checks.prompt_of(3, 40)
        for site in ("resid_post", "attn_out"):
            direction = vector(7, engine.facts.d_model)
            spec = {"op": "add", "site": site, "layers": [2], "inline": {"vector": direction.tolist()}}
            million, billion = (compiled(engine, {**spec, "strength": value}) for value in (1e6, 1e9))
            much, touched = await generate(engine, prompt, million)
            more, again = await generate(engine, prompt, billion)
            assert ids(much) == ids(more)
            assert touched[0].clipped == again[0].clipped == touched[0].prompt + touched[0].generation
            assert (again[0].largest_step or 0) > (touched[0].largest_step or 0) > 1000
            # A step of the server's own is not held to it.
            free = replace(compiled(engine, {**spec, "strength": 1e3}), limited=False)
            held = compiled(engine, {**spec, "strength": 1e3})
            scores = [(await engine.score(prompt, program)).logprobs[1:] for program in (free, held)]
            assert float((scores[0] - scores[1]).abs().max()) > 0.01
