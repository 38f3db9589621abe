"""What must hold on every group of engines: vLLM's log-probabilities are those of plain Hugging Face hooks."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engines.data import CaptureRequest, CompareRequest, Generation, Sampling, Token, Touched
from server.engines.vllm.host.engine import VllmEngine
from tests.engines import reference as ref
from tests.engines.cases import Case, dense_cases, moe_cases, vector
from tests.engines.conftest import compiled, generate, ids
from tests.engines.vllm.conftest import Group

TOLERANCE = 1e-4


def cases_of(group: Group) -> list[Case]:
    facts = group.engine.facts
    if facts.num_experts:
        return moe_cases(facts.d_model, scale=2.0)
    return dense_cases(facts.d_model, facts.d_ff, facts.num_heads, facts.head_dim, facts.num_layers, 2.0)


def prompt_of(i: int, length: int | None = None) -> list[int]:
    """Prompts of 6 to 34 tokens, or of `length`."""
    return [30 + (i * 71 + 53 * t + t * t) % 900 for t in range(length or 6 + 7 * (i % 5))]


def check_tokens(group: Group, prompt: Sequence[int], tokens: Sequence[Token], edits: Sequence[ref.Edit], *,
                 steered: bool, greedy: bool = True) -> None:
    """Tokens and log-probabilities of one completion are those of hooks; if `steered`, far from those without."""
    rows = rows_of(group, prompt, ids(list(tokens)), edits)
    for token, row in zip(tokens, rows, strict=True):
        assert not greedy or token.token_id == int(row.argmax())
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE)
        for other, value in token.top_logprobs:
            assert value == pytest.approx(float(row[other]), abs=TOLERANCE)
    if steered:
        moved = (rows_of(group, prompt, ids(list(tokens)), []) - rows).abs().max()
        assert float(moved) > 100 * TOLERANCE, "the spec does not show in this test"


def rows_of(group: Group, prompt: Sequence[int], generated: Sequence[int], edits: Sequence[ref.Edit]) -> torch.Tensor:
    """Log-probabilities `[G, vocab]` that predict the generated tokens."""
    return ref.logprobs(group.model, [*prompt, *generated], len(prompt), edits)[len(prompt) - 1:-1]


def metric(engine: VllmEngine, name: str) -> float:
    """Sum of one of vLLM's counters over its labels."""
    found = re.findall(rf"^vllm:{name}_total{{[^}}]*}} (\S+)$", engine.metrics().decode(), re.MULTILINE)
    assert found, f"vLLM has no counter {name}"
    return sum(map(float, found))


async def mixed_batch_equals_hooks(group: Group, rounds: int = 2) -> None:
    """All specs and an unsteered request at once; from the second round on prompts come from the cache."""
    cases = cases_of(group)
    programs = [None, *(compiled(group.engine, *spec) for spec, _ in cases)]
    edits: list[Any] = [[], *(edits for _, edits in cases)]
    for _ in range(rounds):
        mixed = await asyncio.gather(*(generate(group.engine, prompt_of(i), p) for i, p in enumerate(programs)))
        for i, (tokens, _) in enumerate(mixed):
            check_tokens(group, prompt_of(i), tokens, edits[i], steered=i > 0)


async def scores_equal_hooks(group: Group, cases: Sequence[Case]) -> None:
    prompt = prompt_of(4)
    for spec, edits in cases:
        scores = await group.engine.score(prompt, compiled(group.engine, *spec), prompt_length=8, full=True, top=3)
        expected = ref.logprobs(group.model, prompt, 8, edits)
        assert scores.full is not None
        assert float((scores.full - expected).abs().max()) < TOLERANCE
        chosen = expected[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        assert torch.allclose(scores.logprobs[1:], chosen, atol=TOLERANCE)
        # In the place of token t stands what the row before it says.
        rows, top = scores.full[:-1], scores.top
        assert top is not None
        assert torch.equal(top.logprobs[1:], rows.topk(3).values)
        assert torch.equal(top.logprobs[1:], rows.gather(1, top.ids[1:]))
        own = scores.logprobs[1:].unsqueeze(1)
        assert torch.equal(top.ranks[1:], 1 + (rows > own).sum(1))


async def capture_is_what_hooks_see(group: Group) -> None:
    spec, edits = cases_of(group)[0]
    token_ids = prompt_of(3)
    requests = [CaptureRequest(token_ids, {"resid_post": [0, 5], "mlp_out": [2], "head_out": [4]}, [-1, 2, 2]),
                CaptureRequest(token_ids[:9], {"resid_pre": [3], "attn_out": [1]})]
    for program, given in ((None, []), (compiled(group.engine, *spec), edits)):
        found = await group.engine.capture(requests, program)
        for request, one in zip(requests, found, strict=True):
            rows = list(range(len(request.token_ids))) if request.positions is None else [-1, 2, 2]
            for site, layers in request.sites.items():
                for layer in layers:
                    expected = seen(group.model, request.token_ids, given, site, layer)[rows]
                    assert one[site][layer].shape == expected.shape
                    assert torch.allclose(one[site][layer], expected, atol=1e-3)


def seen(model: Any, token_ids: Sequence[int], edits: Sequence[ref.Edit], site: str, layer: int) -> torch.Tensor:
    """The activation `[T, width]` at a place, after `edits`."""
    found: list[torch.Tensor] = []

    def look(h: torch.Tensor) -> torch.Tensor:
        found.append(h.clone())
        return h

    ref.logprobs(model, token_ids, len(token_ids), [*edits, ref.Edit(site, layer, look, ref.everywhere)])
    return found[0]


async def comparison_equals_two_plain_passes(group: Group) -> None:
    specs = [spec for spec, _ in cases_of(group)]
    edits = [edits for _, edits in cases_of(group)]
    program = compiled(group.engine, *specs[0], *specs[-1])
    token_ids, length = prompt_of(4), 9
    # Two more in the same passes, the last of them under another program.
    _, found, _ = await group.engine.compare_all([
        CompareRequest(prompt_of(3), 5, program), CompareRequest(token_ids, length, program),
        CompareRequest(prompt_of(2), 6, compiled(group.engine, *specs[1]))])

    def rows(given: Sequence[ref.Edit]) -> torch.Tensor:
        return rows_of(group, token_ids[:length], token_ids[length:], given)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(-1)

    steered = rows([*edits[0], *edits[-1]])
    assert torch.allclose(found.total.kl, kl(steered, rows([])), atol=TOLERANCE)
    assert torch.allclose(found.total.entropy, -(steered.exp() * steered).sum(-1), atol=TOLERANCE)
    if len(program.compiled) == 2:
        assert torch.allclose(found.without[0].kl, kl(steered, rows(edits[-1])), atol=TOLERANCE)
        assert torch.allclose(found.without[1].kl, kl(steered, rows(edits[0])), atol=TOLERANCE)


async def what_was_kept_tells_what_two_passes_tell(group: Group) -> None:
    """Of completions that run and are measured together; some of them twice, as the second time a part of the untouched
    pass is in the cache."""
    engine, specs = group.engine, [spec for spec, _ in cases_of(group)]
    programs = [compiled(engine, *specs[0]), compiled(engine, *specs[0], *specs[-1]),
                compiled(engine, {**specs[0][0], "scope": {"prompt": "none", "generation": {"windows": [[4, 9]]}}})]

    async def finished(number: int) -> CompareRequest:
        prompt = [*prompt_of(4), *prompt_of(number)] * 2
        completion = engine.generate(Generation(f"kept-{number}", prompt, Sampling(12, seed=number),
                                                programs[number % len(programs)], keep_from=len(prompt) - 1))
        ids = [token.token_id async for token in completion]
        return CompareRequest([*prompt, *ids], len(prompt), programs[number % len(programs)], kept=completion.kept())

    requests = await asyncio.gather(*(finished(number) for number in range(6)))
    found = await asyncio.gather(*(engine.compare(request) for request in [*requests, *requests[:3]]))
    assert [one.rerun for one in found] == [None] * 9
    for request, one in zip([*requests, *requests[:3]], found, strict=True):
        anew = await engine.compare(replace(request, kept=None))
        assert anew.rerun == "absent" and len(one.total) == 12
        for ours, theirs in zip((one.total, *one.without), (anew.total, *anew.without), strict=True):
            for name in ("kl", "reverse_kl", "entropy", "other_entropy", "surprise", "end", "other_end"):
                assert torch.allclose(getattr(ours, name), getattr(theirs, name), atol=TOLERANCE), name
        assert torch.allclose(one.residual.relative, anew.residual.relative, atol=TOLERANCE)
        assert torch.allclose(one.residual.cosine, anew.residual.cosine, atol=TOLERANCE)
        assert one.total.kl.max() > 0.01
    assert found[2].total.kl[:5].tolist() == [0.0] * 5, "nothing is touched before the fifth generated token"


SCOPES: tuple[tuple[dict[str, Any], Any], ...] = (
    ({"prompt": "none"}, ref.generated_only),
    ({"generation": "none"}, lambda prompt, total: [t < prompt for t in range(total)]),
    ({"prompt": {"positions": [-1]}}, ref.last_prompt_and_generated),
    ({"generation": {"windows": [[3, 20]]}}, lambda prompt, total: [t < prompt or 3 <= t - prompt < 20
                                                                    for t in range(total)]),
    ({}, ref.everywhere),
    ({"prompt": {"windows": [[5, 9]]}, "generation": {"positions": [0, 12]}},
     lambda prompt, total: [5 <= t < 9 or t - prompt in (0, 12) for t in range(total)]),
)


async def preempted_requests_stay_right(group: Group, count: int = 18, new_tokens: int = 44) -> None:
    """More completions than the cache holds: some are thrown out, and prefilled again with the tokens they had."""
    engine = group.engine
    before = metric(engine, "num_preemptions")
    jobs: list[tuple[list[int], Any, list[ref.Edit], Any]] = []
    for i in range(count):
        scope, touched = SCOPES[i % len(SCOPES)]
        push = vector(300 + i, engine.facts.d_model, 5.0)
        program = compiled(engine, {"op": "add", "layers": [i % 6], "inline": {"vector": push.tolist()},
                                    "scope": scope}) if i % 7 else None
        jobs.append((prompt_of(i, 24), program, [ref.Edit("resid_post", i % 6, ref.add(push), touched)], touched))
    done: list[tuple[list[Token], list[Touched]]] = await asyncio.gather(
        *(generate(engine, prompt, program, max_tokens=new_tokens, logprobs=1) for prompt, program, _, _ in jobs))
    assert metric(engine, "num_preemptions") > before, "the cache was large enough; the test shows nothing"
    for (prompt, program, edits, touched), (tokens, counted) in zip(jobs, done, strict=True):
        assert len(tokens) == new_tokens
        check_tokens(group, prompt, tokens, edits if program else [], steered=program is not None)
        if program is not None:
            # The last token was sampled and never read.
            marks = touched(len(prompt), len(prompt) + new_tokens - 1)
            assert counted == [Touched(sum(marks[:len(prompt)]), sum(marks[len(prompt):]))]
    assert engine.slots.num_pinned == 0


async def rules_by_generated_token_id(group: Group) -> None:
    """A token that turns a vector on, or off, when the model itself writes it."""
    prompt, d = prompt_of(9), group.engine.facts.d_model
    plain, _ = await generate(group.engine, prompt, max_tokens=24)
    trigger = ids(plain)[2]
    only = {"prompt": "none", "generation": {"token_ids": [trigger]}}
    others = {"prompt": "none", "generation": {"exclude": {"token_ids": [trigger]}}}
    seen: list[int] = []

    def on_trigger(length: int, total: int) -> list[bool]:
        return [t >= length and seen[t] == trigger for t in range(total)]

    def off_trigger(length: int, total: int) -> list[bool]:
        return [t >= length and seen[t] != trigger for t in range(total)]

    # In the graph (resid_post), in the opaque op (resid_pre), and one without rules beside them.
    jobs: list[tuple[Any, Any, Any, Any]] = [
        ("resid_post", 70, only, on_trigger), ("resid_post", 71, others, off_trigger),
        ("resid_pre", 72, only, on_trigger), ("resid_post", 73, {}, ref.everywhere)]
    pushes = [vector(seed, d, 5.0) for _, seed, _, _ in jobs]
    programs = [compiled(group.engine, {"op": "add", "site": site, "layers": [1], "scope": scope,
                                        "inline": {"vector": push.tolist()}})
                for (site, _, scope, _), push in zip(jobs, pushes, strict=True)]
    done = await asyncio.gather(*(generate(group.engine, prompt, program, max_tokens=24) for program in programs))
    for (site, _, _, touched), push, (tokens, counted) in zip(jobs, pushes, done, strict=True):
        seen[:] = [*prompt, *ids(tokens)]
        check_tokens(group, prompt, tokens, [ref.Edit(site, 1, ref.add(push), touched)], steered=True)
        marks = touched(len(prompt), len(seen) - 1)
        assert counted == [Touched(sum(marks[:len(prompt)]), sum(marks[len(prompt):]))]
        assert any(marks)
        # Until the trigger is written nothing acts.
        assert touched is not on_trigger or ids(tokens)[:3] == ids(plain)[:3]


async def seeded_draws_do_not_depend_on_chunks(group: Group, draws_by_position: bool = False) -> None:
    """Prompts of three chunks each, drawn from under a seed: the same tokens when the prompt comes from the cache.

    draws_by_position: of vLLM's second runner. The first one takes one number from the generator for each generated
    token, the first for the first, and makes the noise of that; its kernel then gives the tokens of the hooks' rows.
    """
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    push = vector(77, group.engine.facts.d_model, 4.0)
    program = compiled(group.engine, {"op": "add", "layers": [1], "inline": {"vector": push.tolist()}})
    edits = [ref.Edit("resid_post", 1, ref.add(push), ref.everywhere)]
    jobs = [(prompt_of(n, 150), 11 + n, program if n % 2 else None) for n in range(3)]

    async def drawn() -> list[list[int]]:
        done = await asyncio.gather(*(generate(group.engine, prompt, acting, max_tokens=12, temperature=1.5, seed=seed)
                                      for prompt, seed, acting in jobs))
        return [ids(tokens) for tokens, _ in done]

    first = await drawn()
    assert await drawn() == first
    for (prompt, seed, acting), tokens in zip(jobs, first, strict=True):
        assert len(set(tokens)) > 3
        generator = torch.Generator().manual_seed(seed)
        expected: list[int] = []
        for row in rows_of(group, prompt, tokens, edits if acting else []) if not draws_by_position else []:
            noise = torch.randint(0, 2**31, (1,), generator=generator)
            expected.append(int(torch.ops._C.fused_gumbel_argmax((row / 1.5)[None].contiguous(), noise)))
        assert draws_by_position or tokens == expected


async def low_temperatures_are_those_that_were_asked_for(group: Group) -> None:
    """vLLM raises what is under 0.01 to 0.01, at which the second of two near tokens is drawn two times of five."""
    gap, prompt, seeds = 0.004, prompt_of(3), range(24)
    [row] = await group.engine.next_logprobs([prompt])
    (first, second), best = row.topk(2).indices.tolist(), row.topk(2).values
    bias = {second: float(best[0] - best[1]) - gap}

    async def drawn(temperature: float) -> set[int]:
        found = await asyncio.gather(*(generate(group.engine, prompt, max_tokens=1, temperature=temperature, seed=seed,
                                                logit_bias=bias) for seed in seeds))
        return {token for tokens, _ in found for token in ids(tokens)}

    assert await drawn(0.01) == {first, second}
    assert await drawn(0.0005) == {first}
