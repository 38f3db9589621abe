"""Completions that are gone on with from given tokens, as guards need it."""

import uuid
from typing import Any

import pytest

from server.engines.base import Generation, Sampling, Token, Touched
from steering.language.errors import InvalidRequest
from steering.programs.program import Program
from tests.engines import reference as ref
from tests.engines.cases import vector
from tests.engines.conftest import compiled, generate, ids
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


async def what_cannot_go_on_is_refused(group: Group) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await go_on(group, [5, 6], None, presence_penalty=0.5)
    assert refused.value.param == "presence_penalty"
