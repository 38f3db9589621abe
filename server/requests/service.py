"""The way of a completion request, shared by chat and plain completions.

model name -> plan (what steering applies) -> prompt tokens and roles -> checks against the context -> a running `Run`.
"""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial

from server.effects.outcomes import Ended, Outcomes, outcomes_of
from server.effects.report import ChoiceEffect, Effects, InArm
from server.effects.shadow import Finished
from server.errors import ClientTooSlow, ContextLengthExceeded
from server.identity.principal import CURRENT
from server.identity.quotas import count_tokens, tokens_used
from server.requests.admission.caller import Caller
from server.requests.admission.deadline import Deadline
from server.requests.admission.fairness import Client
from server.requests.admission.queue import Cost
from server.requests.beginning import begin, check_contrast, check_guarded
from server.requests.fields import CompletionFields
from server.requests.form import Form, plain_form
from server.requests.gates import Decided, decide
from server.requests.generate import Choice, Run
from server.requests.model_names import ModelName, parse_model, serving
from server.requests.monitor import Watched, watch
from server.requests.plan import Plan
from server.requests.planner import not_steered
from server.requests.receipt import Receipt, receipt
from server.requests.sampling import sampling_of
from server.requests.state import ServerState
from server.requests.traced import trace_generation
from server.requests.trying import Asked, tried
from server.rollouts.arms import Arm, Asking
from server.rollouts.measuring import Seen
from server.rollouts.shadowing import Trial
from server.settings import Settings
from server.text.prompts import Prompt
from steering.language.errors import InvalidRequest, TrimtabError
from steering.programs.program import Applied, Program
from vectors.evaluate.graders.contract import Answer
from vectors.library.audit.notes import ACTOR
from vectors.library.spaces import HOUSE

# Entries of a receipt that are written as JSON at once, in less time than a thread takes to begin.
SMALL_RECEIPT = 64


@dataclass(frozen=True)
class Started:
    """A request on its way: what to answer with."""

    model: str
    run: Run
    plan: Plan
    state: ServerState
    deadline: Deadline
    client: Client
    request_id: str
    audited: bool = False
    asked: Asked | None = None
    operation: str = "chat"
    began: int = field(default_factory=time.time_ns)

    async def receipt(self) -> Receipt:
        """Once all pieces were read. With the measured effects and the monitors' scores, if the request asked for
        them."""
        shadow = self.state.shadow
        shadow.served(self.run.prompt_tokens + self.run.completion_tokens)
        if self.audited:
            self.state.steering_audit.ended(self.model, [prompt.token_ids for prompt in self.run.prompts],
                                            [choice.token_ids for choice in self.run.choices])
        effects = None
        first = self.run.choices[0]
        # A contrast is no work of an arm alone.
        arms = self._arms(first) if self.plan.contrast is None else ()
        self.state.rollout_measuring.answered(arms, first.seconds / len(first.token_ids)
                                              if first.seconds and first.token_ids else None)
        async with self.deadline.held():
            if self.plan.report != "none":
                effects = await shadow.measure(self._finished(), per_token=self.plan.report == "tokens")
            else:
                self._offer()
            graded = None if self.plan.report != "outcome" else await self._graded(effects)
            watched = [Watched(choice.index, choice.decided.program, choice.prompt.token_ids, choice.token_ids,
                               choice.prompt.roles, choice.parts) for choice in self.run.choices]
            monitor = await watch(self.plan.monitors, watched, self.state.engine, self.state.monitor_metrics)
        trace_generation(self.run, self.plan, self.state, operation=self.operation, asked=self.model,
                         request_id=self.request_id, began=self.began, graded=graded)
        made = receipt(self.plan, [choice.outcome() for choice in self.run.choices], self.state.engine_name, effects,
                       monitor, graded)
        if self.plan.report == "none" and len(made.applied) * len(self.run.choices) <= SMALL_RECEIPT:
            self.state.receipts.keep(self.request_id, made)
        else:
            await self.state.pools.complete(lambda: self.state.receipts.keep(self.request_id, made))
        return made

    def _finished(self) -> list[Finished]:
        """The choices that something was applied to."""
        return [Finished(choice.index, program, choice.prompt.token_ids, choice.token_ids, choice.prompt.roles,
                         bool(choice.token_ids) and choice.token_ids[-1] in self.state.vocabulary.end_ids, self._preset,
                         choice.parts, choice.kept, choice.measured, engine=self.state.engine, arms=self._in_arms)
                for choice in self.run.choices if self.plan.contrast is None
                and (program := choice.decided.program) is not None and program.acting]

    @property
    def _in_arms(self) -> tuple[InArm, ...]:
        """What effects and outcomes of the answer are counted under, besides all."""
        return tuple(InArm(arm.rollout, arm.arm) for arm in self.plan.arms)

    @property
    def _preset(self) -> str:
        return next(iter((self.plan.presets or {}).values()), "")

    def _offer(self) -> None:
        """Hand over what nobody waits for: effects that are measured later, and answers that are graded then."""
        drawn = {choice.index: choice for choice in self.run.choices
                 if choice.graded or choice.rolled or choice.shadowed is not None}
        finished = [replace(one, then=self._grading(drawn.pop(one.index))) if one.index in drawn else one
                    for one in self._finished()]
        self.state.shadow.offer(finished)
        for choice in drawn.values():
            self._grading(choice)(None)

    def _grading(self, choice: Choice) -> Callable[[ChoiceEffect | None], None]:
        """What offers the choice to be graded, once it is known whether its effect was measured."""
        live, rolled, context = self.state.live_grading, self.state.rollout_measuring, copy_context()

        def offer(effect: ChoiceEffect | None) -> None:
            if choice.message.finish_reason is None or choice.message.calls:
                return
            ended = replace(self._ended(choice, effect), context=context)
            if choice.graded:
                live.offer(ended)
            seen = Seen(ended, choice.token_ids, _dose(choice, effect))
            if choice.rolled:
                rolled.offer(self._arms(choice), seen)
            if choice.shadowed is not None and self.asked is not None:
                self.state.shadow_arms.offer(Trial(choice.shadowed, seen, partial(
                    tried, self.asked, choice.shadowed, self.state, measured=seen.kl is not None)))

        return offer

    def _arms(self, choice: Choice) -> tuple[Arm, ...]:
        """Those whose guard rails count the choice by itself, and not beside what the candidate makes of its prompt."""
        return tuple(arm for arm in self.plan.arms if arm.rollout != choice.shadowed)

    async def _graded(self, effects: Effects | None) -> Outcomes:
        """What the answers of this request are. Tool calls are no text to grade."""
        measured = {effect.index: effect for effect in ([] if effects is None else effects.choices)}

        def work() -> Outcomes:
            return outcomes_of([self._ended(choice, measured.get(choice.index)) for choice in self.run.choices
                                if not choice.message.calls], self.plan.graders)

        return await self.state.pools.watch(work)

    def _ended(self, choice: Choice, effect: ChoiceEffect | None) -> Ended:
        program = choice.decided.program
        acting = [] if program is None or not program.acting else program.compiled
        return Ended(choice.index, Answer(choice.message.text, ended=choice.message.finish_reason == "stop"),
                     tuple(item.applied.artifact or "inline" for item in acting), self._preset,
                     None if effect is None else effect.text.excess_surprise, self._in_arms)


@dataclass(frozen=True)
class _Taken:
    """What a run takes of quotas, once for each run of the model."""

    run: Run
    runs: int

    @property
    def prompt_tokens(self) -> int:
        return self.runs * self.run.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        return self.runs * self.run.completion_tokens


def _dose(choice: Choice, effect: ChoiceEffect | None) -> float | None:
    """In nats a token; None where it was not measured. Where nothing acted it is 0."""
    program = choice.decided.program
    if program is None or not program.acting:
        return 0.0
    return None if effect is None else effect.total.kl.mean


def _asking(body: CompletionFields, caller: Caller) -> Asking:
    """By what a request sticks to its arm: its user, else its session, else it stands for itself. A user is one of a
    tenant, because tenants name theirs as they like."""
    who = CURRENT.get()
    named = f"user:{body.user}" if body.user else f"session:{caller.session}" if caller.session else (
        f"request:{ACTOR.get().request_id or secrets.token_hex()}")
    return Asking(f"{who.tenant}\n{named}", who.key_id)


async def plan_for(body: CompletionFields, state: ServerState, caller: Caller) -> tuple[ModelName, Plan]:
    model = parse_model(body.model, state)
    if body.n > state.settings.max_choices:
        raise InvalidRequest(f"n is {body.n}, this server allows {state.settings.max_choices}", param="n")
    arms = state.rollouts.arms(_asking(body, caller))
    try:
        plan = await state.pools.complete(lambda: state.planner.plan(body.steering, model.preset, arms))
    except TrimtabError:
        state.rollout_measuring.failed(tuple(arms.taken.values()))
        raise
    for arm in plan.arms:
        state.rollouts.counted(arm)
    if state.settings.require_steering and not plan.steers and plan.disabled is None:
        raise not_steered(("steering",))
    return model, plan


async def start(body: CompletionFields, state: ServerState, plan: Plan, prompts: Sequence[Prompt], *, request_id: str,
                max_tokens: int | None, max_tokens_field: str, prompt_field: str, logprobs: int | None,
                caller: Caller, form: Form | None = None, obeys_kill_switch: bool = True) -> Started:
    """Check the prompts and decide what is gated. The choices go to the engine when the run is read.

    Args:
        max_tokens: of each completion; None for what the engine has room for.
        max_tokens_field, prompt_field: names of these fields in the request.
        logprobs: alternatives to report per token; None for no log-probabilities.
        form: of the text; None for that of a plain completion.
        obeys_kill_switch: False for what the server tries while steering may be off.
    """
    began = time.time_ns()
    state = serving(parse_model(body.model, state), state)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    form = plain_form(body, state) if form is None else form
    plan = plan.within(form.sections)
    if plan.contrast is not None:
        check_contrast(state)
    limit = _room(state, plan, longest, max_tokens, max_tokens_field, prompt_field)
    for prompt in prompts:
        plan.check_prompt(prompt.token_ids, prompt.roles)
    # In a thread, as there may be words to tokenise and many ids to look through.
    sampling = await state.pools.complete(lambda: sampling_of(
        body, state, max_tokens=limit, logprobs=logprobs, grammar=form.grammar))
    if plan.guards:
        check_guarded(sampling[0], state)
    runs = 1 if plan.contrast is None else 2
    await count_tokens(runs * sum(Cost(len(prompt.token_ids) if n == 0 else 0, one.max_tokens).tokens
                                  for prompt in prompts for n, one in enumerate(sampling)))
    decided = await _decided(plan, prompts, state, caller)
    opened = [gate.open for one in decided for gate in one.gates.values()]
    state.metrics.gates(sum(opened), len(opened) - sum(opened))
    # A gate that stayed shut for every prompt leaves its intervention unused.
    used = _used(plan.program, decided) + (
        [] if plan.contrast is None else _used(plan.contrast.program, [one.weak for one in decided if one.weak]))
    run = Run(state.vocabulary, state.metrics, state.runs, request_id=request_id, prompts=prompts, decided=decided,
              n=body.n, sampling=sampling, stops=body.stops, form=form,
              cache_salt=_salt(body.cache_salt, state.settings), begin=partial(begin, state, plan, obeys_kill_switch),
              begun=lambda run: state.metrics.admitted(run.prompt_tokens, used, plan.disabled is not None),
              placed=partial(_failed, state, plan, []), queue=state.queue, client=caller.client,
              deadline=caller.deadline, model_names=[f"{state.settings.model_name}:{ref.partition('@')[0]}"
                                                     for ref in (plan.presets or {}).values()])
    tokens_used(_Taken(run, runs))
    for choice in run.choices:
        steered = choice.decided.program is not None and bool(choice.decided.program.acting)
        if plan.contrast is not None:
            # What one of the two programs does is not what made the text.
            continue
        if steered:
            choice.measured = plan.report != "none" or state.shadow.draws()
        choice.graded = plan.report == "outcome" or (
            plan.report == "none" and state.live_grading.draws(steered=steered, measured=choice.measured))
    if plan.arms and plan.report == "none" and plan.contrast is None:
        # One choice, because several of one request would hang together.
        first = run.choices[0]
        first.rolled = state.rollout_measuring.draws(plan.arms)
        first.shadowed = state.shadow_arms.draws(plan.arms)
        program = first.decided.program
        if (first.rolled or first.shadowed is not None) and program is not None and program.acting:
            first.measured = True
    audited = obeys_kill_switch and state.steering_audit.begun(body.model, body.user, plan)
    asked = None if not plan.arms or run.choices[0].shadowed is None else Asked(
        body.steering, parse_model(body.model, state).preset, _asking(body, caller), prompts[0], form, sampling[0],
        body.stops, _salt(body.cache_salt, state.settings), copy_context())
    return Started(body.model, run, plan, state, caller.deadline, caller.client, request_id, audited, asked,
                   "text_completion" if prompt_field == "prompt" else "chat", began)


def _used(program: Program | None, decided: Sequence[Decided]) -> list[Applied]:
    """The interventions that act for some prompt."""
    return [item.applied for j, item in enumerate(program.compiled if program else ())
            if any(j not in one.gates or one.gates[j].open for one in decided)]


def _failed(state: ServerState, plan: Plan, before: list[TrimtabError], error: TrimtabError) -> TrimtabError:
    """An engine's error in the words of the request. The guard rails of its roll-outs hear of the first one."""
    if not before and not isinstance(error, ClientTooSlow) and plan.contrast is None:
        before.append(error)
        state.rollout_measuring.failed(plan.arms)
    return plan.placed(error)


async def _decided(plan: Plan, prompts: Sequence[Prompt], state: ServerState, caller: Caller) -> list[Decided]:
    """The decisions of the plan's gates. The passes over the prompts that they take hold a place, as completions do."""
    costs = [Cost(sum(len(prompt.token_ids) for prompt in prompts), 0)] if plan.program and plan.program.gates else []
    with state.queue.joined(caller.client, costs, entered=True) as places:
        async with AsyncExitStack() as held:
            for place in places:
                await held.enter_async_context(place)
            try:
                return await decide(plan, prompts, state.engine)
            except TrimtabError as error:
                raise plan.placed(error) from None


def _salt(given: str | None, settings: Settings) -> str | None:
    """What cached prefixes of a request are kept apart by: its tenant, and the salt that it gives. Those of the house
    without one are shared, also with the server's own measurements."""
    tenant = CURRENT.get().tenant
    if settings.share_prefix_cache or (tenant == HOUSE and given is None):
        return given
    return json.dumps([tenant, given])


def _room(state: ServerState, plan: Plan, prompt_tokens: int, wanted: int | None, max_tokens_field: str,
          prompt_field: str) -> int:
    """Tokens a completion may have."""
    room = state.engine.max_sequence_tokens if plan.contrast is None else state.engine.max_contrast_tokens
    if prompt_tokens > room or (prompt_tokens == room and wanted != 0):
        raise ContextLengthExceeded(room, f"the prompt alone has {prompt_tokens}", param=prompt_field,
                                    fix="Shorten the prompt.")
    left = room - prompt_tokens
    cap = state.settings.max_output_tokens
    if wanted is None:
        return min(left, cap or left)
    if cap is not None and wanted > cap:
        raise InvalidRequest(f"{max_tokens_field} is {wanted}, this server allows {cap}", param=max_tokens_field)
    if wanted > left:
        raise ContextLengthExceeded(room, f"{prompt_tokens} prompt tokens and {wanted} of the completion are more",
                                    param=max_tokens_field, fix=f"Ask for {left} at most.")
    return wanted
