"""Guards on a real engine: nothing found changes nothing; a breach is answered at its token, exactly."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.effects.by_part import compare_parts
from server.engines.data import CompareRequest, Generation, Sampling, Token
from server.observability.instruments import Registry
from server.requests.guard import GuardedCompletion, GuardMetrics, HeldGuard, repetition
from server.requests.monitor import Limit, Monitor, MonitorMetrics, Watched, watch
from steering.artifacts.source import Resolved
from steering.language.errors import EngineUnavailable
from steering.language.guard import Guard
from steering.language.intervention import Intervention
from steering.programs.compiler import compile_program
from steering.programs.reading import Reader
from tests.engines import reference as ref
from tests.engines.conftest import at_rest, generate, ids
from tests.engines.test_gates import PROMPTS, VECTOR, WEIGHT

PROMPT = PROMPTS[0]
STRONG = {"op": "add", "layers": [1], "inline": {"vector": (3 * VECTOR).tolist()}}
WEAK = {"op": "add", "layers": [0], "inline": {"vector": (0.01 * WEIGHT).tolist()}}


def guarded(engine: Any, guard: dict[str, Any], *items: dict[str, Any], name: str = "g", roles: Any = None,
            limits: tuple[Limit, ...] = (), **sampling: Any) -> GuardedCompletion:
    resolved = [Resolved(Intervention.model_validate(item)) for item in items]

    async def weaken(factors: Any) -> Any:
        return compile_program([replace(r, factor=f) for r, f in zip(resolved, factors, strict=True)], engine.facts)

    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0, "logprobs": 2, **sampling}
    given = Generation(f"guarded-{name}", PROMPT, Sampling(**settings), compile_program(resolved, engine.facts), roles)
    return GuardedCompletion(engine, given, [HeldGuard(Guard.model_validate({"every": 5, **guard}), limits)], weaken,
                             GuardMetrics(Registry()))


async def said(completion: GuardedCompletion) -> list[Token]:
    return [token async for token in completion]


def greedy(model: Any, so_far: list[int], count: int, factor: float) -> list[int]:
    """Plain continuation with the vector at a factor of its strength on every token, from the start."""
    found = list(so_far)
    edits = [ref.Edit("resid_post", 1, ref.add(factor * 3 * VECTOR), ref.everywhere)] if factor else []
    for _ in range(count):
        found.append(int(ref.logprobs(model, PROMPT + found, len(PROMPT), edits)[-1].argmax()))
    return found


SCOPES = [
    {}, {"scope": {"prompt": "none", "generation": {"windows": [[3, 12]]}}},
    {"scope": {"prompt": {"positions": [-1]}, "generation": {"exclude": {"token_ids": list(range(0, 97, 2))}}}}]


@pytest.mark.parametrize("scope", SCOPES, ids=["everywhere", "window", "token ids"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 7, "frequency_penalty": 0.8,
                                           "repetition_penalty": 1.2, "top_p": 0.9}], ids=["greedy", "sampled"])
async def test_what_is_within_its_limits_is_as_unguarded(start_engine: Any, scope: Any, sampling: Any) -> None:
    engine = await start_engine("qwen3")
    item = {**STRONG, **scope}
    completion = guarded(engine, {"max_kl": 1e6, "max_repetition": 1.0}, item, **sampling)
    tokens = await said(completion)
    plain, touched = await generate(engine, PROMPT, completion.generation.program, max_tokens=20, logprobs=2,
                                    **sampling)
    assert ids(tokens) == ids(plain) and completion.events == [] and completion.checks == 3
    assert [t.finish_reason for t in tokens] == [None] * 19 + ["length"]
    assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in plain], abs=1e-4)
    assert completion.touched() == touched


@pytest.mark.parametrize(("action", "factors"), [("stop", [0.0]), ("lower", [0.5, 0.25, 0.125])])
async def test_a_breach_is_answered_at_its_token(start_engine: Any, model_dir: Any, action: str, factors: list[float]
                                                 ) -> None:
    engine = await start_engine("qwen3")
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()
    completion = guarded(engine, {"max_kl": 1e-4, "action": action}, STRONG)
    tokens = ids(await said(completion))
    assert [(e.token, e.factor, e.reason) for e in completion.events] == [
        (5 * (n + 1), factor, "kl") for n, factor in enumerate(factors)]
    expected: list[int] = []
    for factor in [1.0, *factors, *([0.0] * (3 - len(factors)))]:
        expected = greedy(model, expected, 5, factor)
    assert tokens == expected
    prompt, generation = completion.touched()[0].prompt, completion.touched()[0].generation
    # A token is touched when it is fed back: the fifth one of a part is fed in the next.
    assert (prompt, generation) == (len(PROMPT), 4 if action == "stop" else 19)


async def test_lowered_three_times_it_is_stopped(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    completion = guarded(engine, {"max_kl": 1e-7}, STRONG, max_tokens=40)
    await said(completion)
    assert [e.factor for e in completion.events] == [0.5, 0.25, 0.125, 0.0]
    assert completion.checks == 4, "nothing is checked once nothing acts"


async def test_of_a_stack_the_larger_share_goes(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    for n, stack in enumerate(((WEAK, STRONG), (STRONG, WEAK))):
        completion = guarded(engine, {"max_kl": 0.01, "action": "stop"}, *stack, name=str(n))
        await said(completion)
        assert [e.intervention for e in completion.events] == [1 - n]
        assert completion.parts[-1].program.acting == 1 << n


async def test_an_innocent_vector_is_left_alone(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    completion = guarded(engine, {"max_kl": 0.05, "max_repetition": 1.0}, WEAK)
    await said(completion)
    assert completion.events == [] and completion.checks == 3


@pytest.mark.parametrize(("direction", "away"), [("above", 1), ("below", -1)])
async def test_what_a_monitor_reads_is_a_limit_too(start_engine: Any, model_dir: Any, direction: Any, away: int
                                                   ) -> None:
    """The mean score of each part, by plain hooks, decides; a limit that it does not reach changes nothing."""
    engine = await start_engine("qwen3")
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()
    reader = Reader("probe@1", "resid_post", "linear", {1: {"weight": away * VECTOR, "bias": torch.tensor(0.0)}})

    def mean(said: list[int], factor: float) -> float:
        held: list[torch.Tensor] = []
        ref.logprobs(model, PROMPT + said, len(PROMPT), [
            ref.Edit("resid_post", 1, ref.add(factor * 3 * VECTOR), ref.everywhere),
            ref.Edit("resid_post", 1, lambda h: held.append(h) or h, ref.everywhere)])
        return float((held[-1][-5:] @ (away * VECTOR)).mean())

    strong, plain = mean(greedy(model, [], 5, 1.0), 1.0), mean(greedy(model, [], 5, 0.0), 0.0)
    assert away * strong > away * plain
    for threshold, breached in (((strong + plain) / 2, True), (strong + away * abs(strong), False)):
        limit = Limit(Monitor(reader, None, direction), threshold)
        completion = guarded(engine, {"max_repetition": 1.0, "action": "stop"}, STRONG, limits=(limit,),
                             name=f"{direction}-{breached}", max_tokens=10)
        await said(completion)
        assert [(e.token, e.factor, e.reason) for e in completion.events] == [(5, 0.0, "monitor")] * breached


async def test_a_monitor_that_cannot_be_read_stops_everything(start_engine: Any, monkeypatch: pytest.MonkeyPatch
                                                              ) -> None:
    engine = await start_engine("qwen3")

    async def broken(*_: Any) -> Any:
        raise EngineUnavailable("the pass failed")

    monkeypatch.setattr(engine, "capture", broken)
    reader = Reader("probe@1", "resid_post", "linear", {1: {"weight": VECTOR, "bias": torch.tensor(0.0)}})
    completion = guarded(engine, {"max_repetition": 1.0}, STRONG, limits=(Limit(Monitor(reader, None, "above"), 1e9),))
    await said(completion)
    assert [(e.factor, e.reason) for e in completion.events] == [(0.0, "unmeasured")]


async def test_repetition(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    loop = {"logit_bias": {11: 100.0}}
    completion = guarded(engine, {"max_repetition": 0.5, "action": "stop"}, WEAK, **loop)
    await said(completion)
    # In "a a a a a" the first 3-gram is new and the others are repeats: 2 of 3.
    assert [(e.token, e.reason) for e in completion.events] == [(5, "repetition")]
    assert completion.events[0].repetition == pytest.approx(2 / 3)
    assert repetition([1, 2, 3, 1, 2, 3], 0) == 0.25 and repetition([1, 2, 3, 1, 2, 3], 5) == 1.0
    assert repetition([1, 2], 0) == 0.0


async def test_what_cannot_be_measured_stops_everything(start_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start_engine("qwen3")

    async def broken(request: Any) -> Any:
        raise EngineUnavailable("no")

    monkeypatch.setattr(engine, "compare", broken)
    completion = guarded(engine, {"max_kl": 100.0}, STRONG, WEAK)
    tokens = await said(completion)
    assert [(e.intervention, e.factor, e.reason) for e in completion.events] == [
        (0, 0.0, "unmeasured"), (1, 0.0, "unmeasured")]
    assert len(tokens) == 20 and completion.parts[-1].program.acting == 0


async def test_leaving_early_frees_the_slot(start_engine: Any) -> None:
    engine = await start_engine("qwen3")
    completion = guarded(engine, {"max_kl": 1e6}, STRONG, max_tokens=200)
    async for _ in completion:
        if completion.checks:
            break
    await completion.cancel()
    await generate(engine, PROMPT)
    await at_rest(engine)


async def test_effects_and_monitors_of_a_completion_in_parts(start_engine: Any, model_dir: Any) -> None:
    """Every token under the program of its part."""
    engine = await start_engine("qwen3")
    completion = guarded(engine, {"max_kl": 1e-4, "action": "stop"}, STRONG)
    tokens = ids(await said(completion))
    program = completion.generation.program
    assert program is not None
    whole = await compare_parts(engine, CompareRequest(PROMPT + tokens, len(PROMPT), program), completion.parts)
    first = await engine.compare(CompareRequest(PROMPT + tokens[:5], len(PROMPT), program))
    assert whole.total.kl[:5].tolist() == pytest.approx(first.total.kl.tolist(), abs=1e-5)
    assert whole.total.kl[5:].tolist() == [0.0] * 15 and len(whole.without[0]) == 20
    monitor = Monitor(Reader("p@1", "resid_post", "linear", {1: {"weight": WEIGHT, "bias": torch.tensor(0.0)}}), None,
                      "above")
    watched = Watched(0, program, PROMPT, tokens, None, completion.parts)
    report = (await watch([monitor], [watched], engine, MonitorMetrics(Registry())))[0]
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([PROMPT + tokens]), output_hidden_states=True).hidden_states[2][0]
    expected = (plain @ WEIGHT).tolist()
    choice = report.choices[0]
    assert len(choice.prompt["1"]) == len(PROMPT) and len(choice.generation["1"]) == 20
    assert choice.generation["1"][5:] == pytest.approx(expected[len(PROMPT) + 5:], abs=1e-3)
    assert choice.prompt["1"][0] == pytest.approx(expected[0] + float(3 * VECTOR @ WEIGHT), abs=1e-3)
