"""Scopes that name sections, on any engine, against plain hooks and a slow reader of the whole text.

The models of these tests write no marks, so tokens stand for them by their number.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from server.engines.base import Engine
from server.engines.data import Generation, Sampling, Token, Touched
from steering.artifacts.source import Resolved
from steering.language.intervention import Intervention
from steering.language.vocabulary import Section
from steering.programs.compiler import compile_program
from steering.programs.program import Program
from steering.programs.sections import Mark, Marks, Sections
from tests.engines import reference as ref
from tests.engines.cases import vector
from tests.engines.conftest import generate, ids
from tests.steering.test_sections import section_at

TOLERANCE = 1e-4
MARKS = Marks((Mark("reasoning", "<a>", "</a>"), Mark("json", "```json", "```")))
# A scope's generation part, the sections that it touches, and tokens besides.
SCOPES: list[tuple[dict[str, Any], Sequence[Section], Sequence[int]]] = [
    ({"sections": ["reasoning"]}, ("reasoning",), ()),
    ({"exclude": {"sections": ["json"]}}, ("reasoning", "answer"), ()),
    ({"sections": ["answer", "json"]}, ("answer", "json"), ()),
    ({"sections": ["json"], "positions": [0]}, ("json",), (0,)),
]


def spelled(token: int) -> str:
    return {0: "<a", 1: ">", 2: "</a>", 3: "```json", 4: "```"}.get(token % 7, "x ")


SECTIONS = Sections(MARKS, spell=spelled)


def touching(generated: Sequence[int], picked: Sequence[Section], also: Sequence[int], start: int) -> Any:
    """Which tokens a scope touches; `start` is where the generated ones begin."""
    texts = ["".join(map(spelled, generated[:n + 1])) for n in range(len(generated))]

    def touched(_: int, total: int) -> list[bool]:
        return [t >= start and (section_at(MARKS, texts[t - start]) in picked or t - start in also)
                for t in range(total)]

    return touched


async def scopes_follow_sections(engine: Engine, model: Any, prompt_of: Callable[[int], list[int]], *, count: int,
                                 new_tokens: int) -> None:
    """In a mixed batch, twice, so that the second time finds the first one's tokens in the cache."""
    jobs: list[tuple[list[int], Program, ref.Edit, int]] = []
    for i in range(count):
        push, site = vector(400 + i, engine.facts.d_model, 5.0), "resid_post" if i % 3 else "resid_pre"
        spec = {"op": "add", "site": site, "layers": [i % 3], "inline": {"vector": push.tolist()},
                "scope": {"prompt": "none", "generation": SCOPES[i % 4][0]}}
        program = compile_program([Resolved(Intervention.model_validate(spec))], engine.facts).within(SECTIONS)
        jobs.append((prompt_of(i), program, ref.Edit(site, i % 3, ref.add(push), ref.everywhere), i))
    for _ in range(2):
        done = await asyncio.gather(*(generate(engine, prompt, program, max_tokens=new_tokens,  # type: ignore[arg-type]
                                               temperature=1.0, seed=i) for prompt, program, _, i in jobs))
        for (prompt, _program, edit, i), (tokens, counted) in zip(jobs, done, strict=True):
            touched = touching(ids(tokens), *SCOPES[i % 4][1:], len(prompt))
            marks = touched(0, len(prompt) + new_tokens - 1)
            assert counted == [Touched(0, sum(marks))]
            _check(model, [*prompt, *ids(tokens)], tokens, replace(edit, touched=touched), steered=any(marks))
        # Each section came about, or the test shows little.
        found = {section for tokens, _ in done for section in SECTIONS.of(ids(tokens))}
        assert found == {"reasoning", "answer", "json"}
    await _goes_on(engine, model, *jobs[1], ids(done[1][0])[:new_tokens // 2], new_tokens)


async def _goes_on(engine: Engine, model: Any, prompt: list[int], program: Program, edit: ref.Edit, i: int,
                   before: list[int], new_tokens: int) -> None:
    """From the middle of a completion, whose sections begin before it."""
    rest = engine.generate(Generation(f"goes-on-{i}-{new_tokens}", prompt, Sampling(
        max_tokens=new_tokens, temperature=0.0, logprobs=1), program, generated_ids=tuple(before)))
    tokens = [token async for token in rest]
    touched = touching([*before, *ids(tokens)], *SCOPES[i % 4][1:], len(prompt))
    _check(model, [*prompt, *before, *ids(tokens)], tokens, replace(edit, touched=touched), steered=True)
    assert rest.touched() == [Touched(0, sum(touched(0, len(prompt) + new_tokens - 1)))]


def _check(model: Any, token_ids: list[int], tokens: Sequence[Token], edit: ref.Edit, *, steered: bool) -> None:
    """Log-probabilities of the last tokens are those of hooks, and, if `steered`, far from those without."""
    rows = ref.logprobs(model, token_ids, 0, [edit])[-len(tokens) - 1:-1]
    for token, row in zip(tokens, rows, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE)
    if steered:
        moved = (ref.logprobs(model, token_ids, 0, [])[-len(tokens) - 1:-1] - rows).abs().max()
        assert float(moved) > 100 * TOLERANCE, "the spec does not show in this test"
