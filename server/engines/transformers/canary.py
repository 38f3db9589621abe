"""Proof, at start, that a program acts in the batching loop itself, not only in plain forward passes."""

import asyncio
import math
from collections.abc import Callable

import torch

from server.engines.base import Completion, Engine
from server.engines.data import Generation, Sampling
from steering.artifacts.source import Resolved
from steering.language.errors import EngineFailed, EngineUnavailable, UnsupportedModel
from steering.language.intervention import Intervention
from steering.programs.compiler import compile_program
from steering.programs.program import Program

Begin = Callable[[Generation], Completion]
PROMPT = (1, 2, 3, 4, 5)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


async def check_batching(engine: Engine, begin: Begin, dtype: torch.dtype = torch.float32,
                         largest_step: float = math.inf) -> None:
    """Generate a token with and without a program in one batch and compare with plain forward passes.

    Args:
        begin: makes a completion in an engine that serves nobody yet.
        largest_step: that the engine carries out.

    Raises:
        UnsupportedModel: the batching loop cannot run this model, or gives other log-probabilities than it should.
    """
    facts = engine.facts
    prompt = [token % facts.vocab_size for token in PROMPT]
    program = _program(engine, min(1.0, largest_step / 2))
    try:
        got = await asyncio.gather(_first(begin, prompt, None, "canary-0"),
                                   _first(begin, prompt, program, "canary-1"))
    except (EngineUnavailable, EngineFailed) as error:
        raise UnsupportedModel(f"transformers' continuous batching cannot run {facts.family} ({error.message})",
                               param="model") from error
    for (token, logprob), acting in zip(got, (None, program), strict=True):
        scores = await engine.score(prompt, acting, full=True)
        assert scores.full is not None
        expected = float(scores.full[-1, token])
        if not math.isclose(logprob, expected, abs_tol=TOLERANCE[dtype]):
            raise UnsupportedModel(f"{facts.model_id}: the batching loop gives log-probability {logprob:.5f}, a plain "
                                   f"pass {expected:.5f}", param="model")


def _program(engine: Engine, strength: float) -> Program | None:
    layers = engine.facts.sites.get("resid_post")
    if not layers:
        return None
    vector = torch.randn(engine.facts.d_model, generator=torch.Generator().manual_seed(1)).tolist()
    push = Intervention.model_validate({"op": "add", "inline": {"vector": vector}, "layers": [layers[len(layers) // 2]],
                                        "strength": strength, "options": {"norm_match": True}})
    return compile_program([Resolved(push)], engine.facts)


async def _first(begin: Begin, prompt: list[int], program: Program | None, request_id: str) -> tuple[int, float]:
    completion = begin(Generation(request_id, prompt, Sampling(max_tokens=1, temperature=0.0, logprobs=0),
                                            program))
    token = [token async for token in completion][0]
    assert token.logprob is not None
    return token.token_id, token.logprob
