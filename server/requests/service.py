"""The way of a completion request, shared by chat and plain completions.

model name -> plan (what steering applies) -> prompt tokens and roles -> checks against the context -> a running `Run`.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from server.effects.shadow import Finished
from server.engines.base import Completion, Generation, Sampling
from server.errors import ContextLengthExceeded, UnsupportedParameter
from server.requests.admission.caller import Caller
from server.requests.admission.deadline import Deadline
from server.requests.admission.fairness import Client
from server.requests.admission.queue import Cost
from server.requests.fields import LEAST_TEMPERATURE, CompletionFields
from server.requests.gates import Decided, decide
from server.requests.generate import Run, choice_seed
from server.requests.guard import GuardedCompletion
from server.requests.model_names import ModelName, parse_model
from server.requests.monitor import Watched, watch
from server.requests.plan import Plan
from server.requests.planner import not_steered
from server.requests.receipt import Receipt, receipt
from server.requests.schema import ChatRequest
from server.requests.state import ServerState
from server.requests.switched import SwitchedCompletion
from server.text.prompts import Prompt
from steering.language.errors import InvalidRequest, InvalidSpec, TrimtabError
from steering.programs.program import Program

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

    async def receipt(self) -> Receipt:
        """Once all pieces were read. With the measured effects and the monitors' scores, if the request asked for
        them."""
        shadow = self.state.shadow
        shadow.served(self.run.prompt_tokens + self.run.completion_tokens)
        effects = None
        async with self.deadline.held():
            if self.plan.report != "none":
                effects = await shadow.measure(self._finished(), per_token=self.plan.report == "tokens")
            else:
                shadow.offer(self._finished())
            watched = [Watched(choice.index, choice.decided.program, choice.prompt.token_ids, choice.token_ids,
                               choice.prompt.roles, choice.parts) for choice in self.run.choices]
            monitor = await watch(self.plan.monitors, watched, self.state.engine, self.state.monitor_metrics)
        made = receipt(self.plan, [choice.outcome() for choice in self.run.choices], self.state.engine_name, effects,
                       monitor)
        if self.plan.report == "none" and len(made.applied) * len(self.run.choices) <= SMALL_RECEIPT:
            self.state.receipts.keep(self.request_id, made)
        else:
            await self.state.pools.complete(lambda: self.state.receipts.keep(self.request_id, made))
        return made

    def _finished(self) -> list[Finished]:
        """The choices that something was applied to."""
        preset = next(iter((self.plan.presets or {}).values()), "")
        return [Finished(choice.index, program, choice.prompt.token_ids, choice.token_ids, choice.prompt.roles,
                         bool(choice.token_ids) and choice.token_ids[-1] in self.state.vocabulary.end_ids, preset,
                         choice.parts, choice.kept, choice.measured)
                for choice in self.run.choices if (program := choice.decided.program) is not None and program.acting]


async def plan_for(body: CompletionFields, state: ServerState) -> tuple[ModelName, Plan]:
    model = parse_model(body.model, state)
    if body.n > state.settings.max_choices:
        raise InvalidRequest(f"n is {body.n}, this server allows {state.settings.max_choices}", param="n")
    plan = await state.pools.complete(lambda: state.planner.plan(body.steering, model.preset))
    if state.settings.require_steering and not plan.steers and plan.disabled is None:
        raise not_steered(("steering",))
    return model, plan


async def start(body: CompletionFields, state: ServerState, plan: Plan, prompts: Sequence[Prompt], *, request_id: str,
                max_tokens: int | None, max_tokens_field: str, prompt_field: str, logprobs: int | None,
                caller: Caller, obeys_kill_switch: bool = True) -> Started:
    """Check the prompts and decide what is gated. The choices go to the engine when the run is read.

    Args:
        max_tokens: of each completion; None for what the engine has room for.
        max_tokens_field, prompt_field: names of these fields in the request.
        logprobs: alternatives to report per token; None for no log-probabilities.
        obeys_kill_switch: False for what the server tries while steering may be off.
    """
    longest = max(len(prompt.token_ids) for prompt in prompts)
    limit = _room(state, longest, max_tokens, max_tokens_field, prompt_field)
    for prompt in prompts:
        plan.check_prompt(prompt.token_ids, prompt.roles)
    sampling = [_sampling(body, state, limit, logprobs, i) for i in range(body.n)]
    if plan.guards:
        _check_guarded(sampling[0], state)
    decided = await _decided(plan, prompts, state, caller)
    # A gate that stayed shut for every prompt leaves its intervention unused.
    used = [item.applied for j, item in enumerate(plan.program.compiled if plan.program else ())
            if any(j not in one.gates or one.gates[j].open for one in decided)]
    run = Run(state.vocabulary, state.metrics, state.runs, request_id=request_id, prompts=prompts, decided=decided,
              n=body.n, sampling=sampling, stops=body.stops, begin=partial(_begin, state, plan, obeys_kill_switch),
              begun=lambda run: state.metrics.admitted(run.prompt_tokens, used, plan.disabled is not None),
              placed=plan.placed, queue=state.queue, client=caller.client, deadline=caller.deadline)
    for choice in run.choices:
        if choice.decided.program is not None and choice.decided.program.acting:
            choice.measured = plan.report != "none" or state.shadow.draws()
    return Started(body.model, run, plan, state, caller.deadline, caller.client, request_id)


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


def _check_guarded(sampling: Sampling, state: ServerState) -> None:
    """Raises InvalidSpec where the engine cannot make a completion in parts, as guards need it."""
    if "resume" not in state.engine.features:
        raise InvalidSpec(f"the engine {state.engine_name} cannot weaken the steering of a running completion, so "
                          "specs with a guard are refused", param=("steering", "guard"), fix="Leave guards out.")
    for name in state.engine.not_resumed:
        if getattr(sampling, name):
            field = "response_format" if name == "json_schema" else name
            raise InvalidSpec(f"a guard does not go with {field} on the engine {state.engine_name}",
                              param=("steering", "guard"), fix="Leave one of them out.")


def _begin(state: ServerState, plan: Plan, obeys: bool, generation: Generation, decided: Decided) -> Completion:
    """A choice in the engine; where something acts, under the kill switch, and guarded where the plan says so."""
    program = decided.program
    if program is None or not program.acting:
        return state.engine.generate(generation)
    closed = [j for j, decision in decided.gates.items() if not decision.open]

    async def weaken(factors: Sequence[float]) -> Program:
        return await state.pools.complete(lambda: state.planner.weakened(plan, closed, list(factors)))

    def begin() -> Completion:
        if plan.guards:
            return GuardedCompletion(state.engine, generation, plan.guards, weaken, state.guard_metrics)
        return state.engine.generate(generation)

    if not obeys:
        return begin()
    return SwitchedCompletion(state.engine, generation, program, begin, state.kill_switch,
                              ends=plan.required or state.settings.kill_switch_running == "end")


def _room(state: ServerState, prompt_tokens: int, wanted: int | None, max_tokens_field: str, prompt_field: str) -> int:
    """Tokens a completion may have."""
    room = state.engine.max_sequence_tokens
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


def _sampling(body: CompletionFields, state: ServerState, max_tokens: int, logprobs: int | None, index: int
              ) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=_temperature(body),
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body, state),
        seed=choice_seed(body.seed, index),
        stop_token_ids=state.vocabulary.end_ids,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        json_schema=_json_schema(body, state),
    )


def _temperature(body: CompletionFields) -> float:
    if body.temperature is None:
        return 1.0
    return body.temperature if body.temperature >= LEAST_TEMPERATURE else 0.0


def _json_schema(body: CompletionFields, state: ServerState) -> dict[str, Any] | None:
    wanted = body.response_format.schema_of_answer if isinstance(body, ChatRequest) and body.response_format else None
    if wanted is not None and "structured_outputs" not in state.engine.features:
        raise UnsupportedParameter(f"the {state.engine_name} engine writes free text only", param="response_format",
                                   fix="Leave response_format out, or start the server with --engine vllm.")
    return wanted


def _logit_bias(body: CompletionFields, state: ServerState) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        param = ("logit_bias", key[:40])
        if not (key.isascii() and key.isdigit() and len(key) <= 12 and int(key) < state.vocabulary.vocab_size):
            raise InvalidRequest(f"{key[:40]!r} is no token id", param=param,
                                 fix=f"Use 0 to {state.vocabulary.vocab_size - 1}.")
        if not -100 <= value <= 100:
            raise InvalidRequest("the bias must be between -100 and 100", param=param)
        bias[int(key)] = value
    return bias
