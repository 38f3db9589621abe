"""Completions that are gone on with from given tokens, as guards need it."""

import asyncio
import uuid
from typing import Any, cast

import pytest

from server.effects.by_part import compare_parts
from server.engines.data import CompareRequest, Generation, Sampling, Token, Touched
from server.requests.killswitch import KillSwitch
from server.requests.switched import SwitchedCompletion
from steering.language.errors import InvalidRequest
from steering.programs.program import Program
from tests.engines import reference as ref
from tests.engines.cases import vector
from tests.engines.conftest import compiled, generate, ids
from tests.engines.test_switched import Switch
from tests.engines.vllm.checks import TOLERANCE, prompt_of, rows_of
from tests.engines.vllm.conftest import Group

TOKENS, FIRST = 14, 5
GREEDY: dict[str, Any] = {"temperature": 0.0}
DRAWN: dict[str, Any] = {"temperature": 1.5, "seed": 7, "repetition_penalty": 1.2}
PROMPT = prompt_of(8)


async def go_on(group: Group, before: list[int], program: Program | None, **sampling: Any
                ) -> tuple[list[Token], list[Touched]]:
    settings = Sampling(**{"max_tokens": TOKENS, "logprobs": 2, **sampling})
    completion = group.engine.generate(Generation(uuid.uuid4().hex, PROMPT, settings, program, generated_ids=before))
    return [token async for token in completion], completion.touched()


async def goes_on_as_in_one_go(group: Group, draws_by_position: bool = False) -> None:
    """Tokens, log-probabilities, random draws and counts are those of a completion that was never cut.

    draws_by_position: vLLM's second runner places the draws of a seed by position, the first counts them.
    """
    push = vector(400, group.engine.facts.d_model, 4.0)
    program = compiled(group.engine, {"op": "add", "layers": [2], "inline": {"vector": push.tolist()}, "scope": {
        "prompt": {"positions": [-1]}, "generation": {"windows": [[3, 9]]}}})
    for acting in (program, None):
        for sampling in (GREEDY, DRAWN):
            whole, touched = await generate(group.engine, PROMPT, acting, max_tokens=TOKENS, **sampling)
            rest, counted = await go_on(group, ids(whole)[:FIRST], acting, **sampling)
            assert ids(rest) == ids(whole)[FIRST:]
            assert [t.logprob for t in rest] == pytest.approx([t.logprob for t in whole[FIRST:]], abs=TOLERANCE)
            assert counted == touched
    # Control: where draws are counted, the same tokens taken for prompt are followed by the seed's first draws again.
    other, _ = await generate(group.engine, [*PROMPT, *ids(whole)[:FIRST]], max_tokens=TOKENS - FIRST, **DRAWN)
    assert (ids(other) == ids(whole)[FIRST:]) == draws_by_position


async def goes_on_under_another_program(group: Group) -> None:
    """As if that had acted from the start."""
    push = vector(401, group.engine.facts.d_model, 4.0)
    scope = {"prompt": "none", "generation": {"windows": [[2, 30]]}}
    program = compiled(group.engine, {"op": "add", "layers": [1], "inline": {"vector": push.tolist()}, "scope": scope})
    edits = [ref.Edit("resid_post", 1, ref.add(push), lambda prompt, total: [t - prompt >= 2 for t in range(total)])]
    plain, _ = await generate(group.engine, PROMPT, max_tokens=FIRST)
    rest, counted = await go_on(group, ids(plain), program, temperature=0.0)
    rows = rows_of(group, PROMPT, [*ids(plain), *ids(rest)], edits)[FIRST:]
    untouched = rows_of(group, PROMPT, [*ids(plain), *ids(rest)], [])[FIRST:]
    assert [t.token_id for t in rest] == rows.argmax(-1).tolist()
    assert [t.logprob for t in rest] == pytest.approx(rows.max(-1).values.tolist(), abs=TOLERANCE)
    assert float((rows - untouched).abs().max()) > 100 * TOLERANCE
    assert counted == [Touched(0, TOKENS - 3)]


async def goes_on_unsteered_when_it_is_switched_off(group: Group) -> None:
    """Several streams at once, of which each was steered up to a token of its own; what is measured afterwards says the
    same. One that is not steered notices nothing."""
    push = vector(402, group.engine.facts.d_model, 8.0)
    program = compiled(group.engine, {"op": "add", "layers": [2], "inline": {"vector": push.tolist()}})
    edits = [ref.Edit("resid_post", 2, ref.add(push), ref.everywhere)]
    switch, said = Switch(), {n: [] for n in (8, 9, 10)}  # type: ignore[var-annotated]

    def begin(n: int) -> SwitchedCompletion:
        given = Generation(f"switched-{uuid.uuid4().hex}", prompt_of(n), Sampling(max_tokens=TOKENS, temperature=0.0),
                           program)
        return SwitchedCompletion(group.engine, given, program, lambda: group.engine.generate(given),
                                  cast(KillSwitch, switch), ends=False)

    async def read(n: int, completion: SwitchedCompletion) -> None:
        async for token in completion:
            said[n].append(token.token_id)
            if n == 9 and len(said[n]) == FIRST:
                switch.turn()

    alone, _ = await generate(group.engine, PROMPT, max_tokens=TOKENS)
    completions = {n: begin(n) for n in said}
    beside, *_ = await asyncio.gather(generate(group.engine, PROMPT, max_tokens=TOKENS),
                                      *(read(n, completion) for n, completion in completions.items()))
    assert ids(beside[0]) == ids(alone)
    for n, completion in completions.items():
        off = completion.switched_off
        assert off is not None and 0 < off < TOKENS and not completion.ended and (n != 9 or off == FIRST)
        steered, plain = (rows_of(group, prompt_of(n), said[n], acting).argmax(-1).tolist() for acting in (edits, []))
        assert said[n] == [*steered[:off], *plain[off:]]
        assert said[n] != plain and steered != plain, "without this the switch would have changed nothing"
        assert completion.touched()[0].generation < TOKENS - 1
        found = await compare_parts(group.engine, CompareRequest([*prompt_of(n), *said[n]], len(prompt_of(n)), program),
                                    list(completion.parts))
        assert float(found.total.kl[:off].max()) > 0.01 and float(found.total.kl[off:].abs().max()) < 1e-5
    assert group.engine.slots.num_pinned == 0 and not switch.listeners


async def what_cannot_go_on_is_refused(group: Group) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await go_on(group, [5, 6], None, presence_penalty=0.5)
    assert refused.value.param == "presence_penalty"
