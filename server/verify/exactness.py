"""Whether an engine gives, in one mixed batch, the log-probabilities that plain hooks give."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from server.engines.base import Engine
from server.engines.data import Generation, Sampling
from server.verify.cases import Case
from server.verify.hooks import logprobs
from steering.artifacts.source import Resolved
from steering.language.spec import Intervention
from steering.programs.compiler import compile_program
from steering.programs.program import Program

ROUNDS = 2
NEW_TOKENS = 8
ALTERNATIVES = 20
# Nats that log-probabilities may be off by on the average: what the format rounds off, and sums that are taken in
# another order. The reference runs in float32 in any case, so what half precision rounds off counts in full.
TOLERANCE = {"float32": 0.001, "float16": 0.05, "bfloat16": 0.25}
# A control is found if it is farther off than this and than twice as far as the answer itself.
FOUND = 0.001
_names = itertools.count()


@dataclass(frozen=True)
class Answer:
    """What an engine generated: token ids, and per token the log-probabilities that it told."""

    prompt: Sequence[int]
    token_ids: Sequence[int]
    told: Sequence[dict[int, float]]


@dataclass(frozen=True)
class Exact:
    """How far one case is from plain hooks: nats, mean over its tokens and over the alternatives that were told.

    off: from the hooks that do the same. wrong_strength, wrong_scope, unsteered: from hooks that do not; None for the
    request that nothing steers. op, site: None for cases of several.
    """

    name: str
    op: str | None
    site: str | None
    off: float
    wrong_strength: float | None
    wrong_scope: float | None
    unsteered: float | None
    tolerance: float

    @property
    def exact(self) -> bool:
        return self.off <= self.tolerance

    @property
    def controlled(self) -> bool:
        """Whether both errors, had the engine made them, would have been found."""
        least = max(FOUND, 2 * self.off)
        return all(value is None or value > least for value in (self.wrong_strength, self.wrong_scope))


def compiled(engine: Engine, interventions: Sequence[Any]) -> Program | None:
    if not interventions:
        return None
    return compile_program([Resolved(Intervention.model_validate(one)) for one in interventions], engine.facts)


async def generated(engine: Engine, prompt: Sequence[int], program: Program | None, *, max_tokens: int = NEW_TOKENS,
                    logprobs: int | None = ALTERNATIVES) -> Answer:
    """One greedy completion."""
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs)
    tokens = [token async for token in engine.generate(
        Generation(f"verify-{next(_names)}", list(prompt), sampling, program))]
    told = [dict(token.top_logprobs) | ({} if token.logprob is None else {token.token_id: token.logprob})
            for token in tokens]
    return Answer(prompt, [token.token_id for token in tokens], told)


async def mixed_batches(engine: Engine, cases: Sequence[Case], prompts: Sequence[Sequence[int]]) -> list[list[Answer]]:
    """All cases at once, and once more so that the prompts come from the cache. The answers of each case."""
    programs = [compiled(engine, case.interventions) for case in cases]
    rounds = [await asyncio.gather(*(generated(engine, prompts[i % len(prompts)], program)
                                     for i, program in enumerate(programs))) for _ in range(ROUNDS)]
    return [list(answers) for answers in zip(*rounds, strict=True)]


def compare(model: Any, case: Case, answers: Sequence[Answer], tolerance: float) -> Exact:
    """The answers of one case against hooks on `model`: the largest distance of the rounds, and of each control the
    smallest."""
    controls = (case.wrong_strength, case.wrong_scope, ()) if case.interventions else ()
    rows: dict[tuple[int, ...], torch.Tensor] = {}
    distances = []
    for answer in answers:
        # The rounds have said the same, unless rounding has decided a tie in another way.
        length, text = len(answer.prompt), (*answer.prompt, *answer.token_ids)
        if text not in rows:
            rows[text] = logprobs(model, text, length, (case.right, *controls))[:, length - 1:-1]
        distances.append([_distance(answer, row) for row in rows[text]])
    off = max(found[0] for found in distances)
    least: list[float | None] = [min(found[i] for found in distances) for i in range(1, 1 + len(controls))]
    wrong_strength, wrong_scope, unsteered = least or [None, None, None]
    return Exact(case.name, case.op, case.site, off, wrong_strength, wrong_scope, unsteered, tolerance)


def _distance(answer: Answer, rows: torch.Tensor) -> float:
    """rows: log-probabilities `[G, vocab]` that predict the generated tokens."""
    each = [(torch.tensor(list(told.values())) - at[list(told)]).abs().mean()
            for told, at in zip(answer.told, rows, strict=True)]
    return float(torch.stack(each).mean().nan_to_num(torch.inf))
