"""What a candidate makes of a prompt that the stable version has answered: the same request again, for nobody."""

import secrets
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from functools import partial

from server.effects.outcomes import Ended
from server.effects.shadow import Finished
from server.engines.base import Completion
from server.engines.data import Generation, Sampling
from server.observability.metrics import Metrics
from server.requests.admission.deadline import Deadline
from server.requests.admission.fairness import LAST
from server.requests.beginning import begin
from server.requests.form import Form
from server.requests.gates import Decided, decide
from server.requests.generate import Choice, Run
from server.requests.plan import Plan
from server.requests.state import ServerState
from server.rollouts.arms import Asking
from server.rollouts.measuring import Seen
from server.text.prompts import Prompt
from steering.language.spec import Steering
from vectors.evaluate.graders.contract import Answer


@dataclass(frozen=True)
class Asked:
    """A request, as far as it has to be made again. context: of who asked, whose policies hold."""

    steering: Steering
    preset: str | None
    asking: Asking
    prompt: Prompt
    form: Form
    sampling: Sampling
    stops: Sequence[str]
    cache_salt: str | None
    context: Context


async def tried(asked: Asked, rollout: str, state: ServerState, *, measured: bool) -> Seen | None:
    """What the candidate of a roll-out makes of the request; None where it would not act, or where steering was turned
    off meanwhile.

    Args:
        measured: whether its dose is wanted.

    Raises:
        TrimtabError: what a user would have been told.
    """
    arms = state.rollouts.arms(asked.asking, forced=rollout)
    plan = await state.pools.watch(lambda: asked.context.run(state.planner.plan, asked.steering, asked.preset, arms))
    if rollout not in arms.taken or arms.taken[rollout].arm != "candidate":
        return None
    plan = plan.within(asked.form.sections)
    plan.check_prompt(asked.prompt.token_ids, asked.prompt.roles)
    decided = await decide(plan, [asked.prompt], state.engine)
    # Its times and tokens are none of those that were served, so they go to metrics that nobody reads.
    run = Run(state.vocabulary, Metrics(), state.runs, request_id=f"shadow-{secrets.token_hex(12)}",
              prompts=[asked.prompt], decided=decided, n=1, sampling=[asked.sampling], stops=asked.stops,
              form=asked.form, cache_salt=asked.cache_salt, begin=partial(_as_guest, state, plan),
              begun=lambda run: None, placed=plan.placed, queue=state.queue, client=(LAST, rollout, ""),
              deadline=Deadline(None))
    choice = run.choices[0]
    choice.rolled = True
    async for _ in run.pieces():
        pass
    if choice.switched_off is not None or choice.message.calls:
        return None
    preset = next(iter((plan.presets or {}).values()), "")
    kl, excess = await _measured(choice, preset, state) if measured else (None, None)
    program = choice.decided.program
    acting = () if program is None or not program.acting else program.compiled
    ended = Ended(0, Answer(choice.message.text, ended=choice.message.finish_reason == "stop"),
                  tuple(item.applied.artifact or "inline" for item in acting), preset, excess)
    return Seen(ended, choice.token_ids, kl)


def _as_guest(state: ServerState, plan: Plan, generation: Generation, decided: Decided) -> Completion:
    return begin(state, plan, True, replace(generation, guest=True), decided)


async def _measured(choice: Choice, preset: str, state: ServerState) -> tuple[float | None, float | None]:
    """Dose and excess surprise, which no store of effects gets, because nobody had this answer."""
    program = choice.decided.program
    if program is None or not program.acting:
        return 0.0, None
    if not choice.token_ids:
        return None, None
    ended = choice.token_ids[-1] in state.vocabulary.end_ids
    effect = await state.shadow.looked_at(Finished(
        0, program, choice.prompt.token_ids, choice.token_ids, choice.prompt.roles, ended, preset, choice.parts,
        engine=state.engine))
    return (None, None) if effect is None else (effect.total.kl.mean, effect.text.excess_surprise)
