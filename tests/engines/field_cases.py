"""Fields that change which token is chosen, on any engine: each against a greedy loop over plain transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from server.engines.base import Engine
from server.engines.data import Generation, Sampling
from steering.programs.program import Program
from tests.engines import reference as ref

TOKENS = 8
# What a field makes of the scores of the next token, given the tokens generated so far.
Rule = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


def _forbid(*ids: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forbidden(row: torch.Tensor) -> torch.Tensor:
        row[list(ids)] = -torch.inf
        return row

    return forbidden


def cases_of(plain: Sequence[int], vocab_size: int) -> list[tuple[dict[str, Any], Rule]]:
    """Each of them changes the text `plain` that the model writes without it."""
    first, second, stop = plain[0], plain[1], plain[2]
    some = tuple(token for token in range(3, vocab_size, 2) if token != first)

    def biased(row: torch.Tensor, done: Sequence[int]) -> torch.Tensor:
        row[first] -= 100.0
        row[some[0]] += 3.0
        return row

    def late(row: torch.Tensor, done: Sequence[int]) -> torch.Tensor:
        return _forbid(stop)(row) if len(done) < 5 else row

    def only(row: torch.Tensor, done: Sequence[int]) -> torch.Tensor:
        kept = torch.full_like(row, -torch.inf)
        kept[list(some)] = row[list(some)]
        return kept

    def unsaid(row: torch.Tensor, done: Sequence[int]) -> torch.Tensor:
        return _forbid(second)(row) if done and done[-1] == first else row

    return [({"logit_bias": {first: -100.0, some[0]: 3.0}}, biased),
            ({"min_tokens": 5, "stop_token_ids": (stop,)}, late),
            ({"allowed_token_ids": some}, only),
            ({"bad_words": ((first, second),)}, unsaid),
            ({"bad_words": ((first,),)}, lambda row, done: _forbid(first)(row))]


def written(model: Any, prompt: Sequence[int], edits: Sequence[ref.Edit], rule: Rule, stops: Sequence[int]
            ) -> list[int]:
    done: list[int] = []
    while len(done) < TOKENS and not (done and done[-1] in stops):
        row = ref.logprobs(model, [*prompt, *done], len(prompt), edits)[-1].clone()
        done.append(int(rule(row, done).argmax()))
    return done


def varied(model: Any, prompts: Sequence[Sequence[int]], edits: Sequence[ref.Edit]
           ) -> tuple[Sequence[int], list[int]]:
    """The first prompt that is not answered by one token again and again, and its answer."""
    for prompt in prompts:
        plain = written(model, prompt, edits, lambda row, done: row, ())
        if len(set(plain[:3])) == 3:
            return prompt, plain
    raise AssertionError("the answers to all of these prompts repeat one token")


async def fields_choose_as_a_greedy_loop(engine: Engine, model: Any, prompts: Sequence[Sequence[int]], program: Program,
                                        edits: Sequence[ref.Edit]) -> None:
    """Unsteered and steered; salted, which changes no token, and scored, as `prompt_logprobs` are."""
    for n, (acting, hooks) in enumerate(((None, []), (program, edits))):
        prompt, plain = varied(model, prompts, hooks)
        for m, (fields, rule) in enumerate(cases_of(plain, engine.facts.vocab_size)):
            expected = written(model, prompt, hooks, rule, fields.get("stop_token_ids", ()))
            assert expected != plain
            completion = engine.generate(Generation(
                f"fields-{n}-{m}", prompt, Sampling(TOKENS, 0.0, ignore_eos="stop_token_ids" not in fields, **fields),
                acting, cache_salt="mine" if m % 2 else None))
            assert [token.token_id async for token in completion] == expected, (fields, acting is not None)
        top = (await engine.score(prompt, acting, top=2)).top
        assert top is not None
        rows = ref.logprobs(model, prompt, len(prompt), hooks)[:-1].topk(2)
        assert torch.equal(top.ids[1:], rows.indices)
        assert top.logprobs[1:].flatten().tolist() == pytest.approx(rows.values.flatten().tolist(), abs=1e-4)
