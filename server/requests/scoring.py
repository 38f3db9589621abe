"""Log-probabilities of the prompts of a request, steered as its completions are: one pass over each of them."""

from dataclasses import dataclass

from server.engines.data import Scores, Touched
from server.engines.touching import count_touched
from server.requests.admission.queue import Cost
from server.requests.generate import Choice
from server.requests.service import Started
from steering.language.errors import TrimtabError


@dataclass(frozen=True)
class PromptToken:
    """logprob, rank, top: as `Scores` has them. None and none for the first token, which nothing predicts."""

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


async def score_prompts(started: Started, top: int) -> list[list[PromptToken]]:
    """One list per prompt, with `top` alternatives for each token. Choices that generate nothing are told what was
    touched here.

    Raises:
        TrimtabError: as `Engine.score`, in the request's words.
    """
    run, state, found = started.run, started.state, []
    firsts = run.choices[::run.choices_per_prompt]
    costs = [Cost(len(choice.prompt.token_ids), 0) for choice in firsts]
    with state.queue.joined(started.client, costs) as places:
        async with started.deadline.held():
            for number, (choice, place) in enumerate(zip(firsts, places, strict=True)):
                async with place:
                    # What would be steered now is not, while all steering is off.
                    off = state.kill_switch.on
                    program = None if off else choice.decided.program
                    try:
                        scores = await state.engine.score(choice.prompt.token_ids, program, top=top)
                    except TrimtabError as error:
                        raise started.plan.placed(error) from None
                found.append(await state.pools.complete(lambda c=choice, s=scores: _tokens(c, s)))  # type: ignore[misc]
                start = number * run.choices_per_prompt
                for own in run.choices[start:start + run.choices_per_prompt]:
                    own.touched = _touched(own, off)
                    own.switched_off = 0 if off and program is not choice.decided.program else None
    return found


def _tokens(choice: Choice, scores: Scores) -> list[PromptToken]:
    if scores.top is None:
        raise RuntimeError("the engine gave no ranks though they were asked for")
    ids = choice.prompt.token_ids
    rows = zip(ids, scores.logprobs.tolist(), scores.top.ranks.tolist(), scores.top.ids.tolist(),
               scores.top.logprobs.tolist(), strict=True)
    _, *rest = (PromptToken(token, logprob, rank, tuple(zip(others, values, strict=True)))
                for token, logprob, rank, others, values in rows)
    return [PromptToken(ids[0]), *rest]


def _touched(choice: Choice, off: bool) -> list[Touched]:
    program, ids = choice.decided.program, choice.prompt.token_ids
    touch = program.touch(ids, 0, choice.prompt.roles) if program is not None and program.acting and not off else None
    return count_touched(program, touch, ids, len(ids))
