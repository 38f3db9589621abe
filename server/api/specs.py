"""`POST /v1/specs/check`: what interventions that act together do to each other."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from server.api.library.of_model import OfModel, served
from server.api.route import StrictRoute
from server.background.apart import apart
from server.background.job import Control, Job
from server.errors import ContextLengthExceeded
from server.identity.principal import CURRENT
from server.requests.plan import Plan
from server.requests.policy_gate import check_job
from server.requests.reading import Text, check_reading, length_of, prompt_to_read
from server.requests.state import ServerState, State
from server.requests.submitting import submitted
from server.text.prompts import Prompt
from server.threads import in_thread
from server.workbench.subject import EngineSubject, sample
from steering.language.errors import InvalidRequest, TrimtabError
from steering.language.spec import Steering
from steering.programs.program import Program
from vectors.extract.trial.effort import seconds
from vectors.stacks.report import Part
from vectors.stacks.run import MOST_ORDERS, MOST_PAIRS, PROMPTS, check
from vectors.stacks.run import Text as Read

router = APIRouter(prefix="/v1/specs", tags=["checks"], route_class=StrictRoute)
# Tokens that may go through the model for one check.
MOST_TOKENS = 2**20


class StackCheckBody(BaseModel):
    """A spec of several interventions, and texts to try them on."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    steering: Steering = Field(description="As a request has it: presets and the default spec are a part of the stack.")
    prompts: Annotated[list[Text], Field(max_length=64)] = Field(
        default=[], description="As they come in use; none: 16 beginnings of English sentences.")
    max_tokens: int = Field(default=8, ge=1, le=32, description="Of the continuation that the untouched model writes "
                            "to each prompt, on which effects are measured.")


@router.post("/check", status_code=202)
async def create_stack_check(body: StackCheckBody, state: State, model: OfModel = None) -> Job:
    """Start the job. Its result is the report: what each intervention does alone, where one acts on what another left
    and how much of that is kept, what the stack does beyond the sum of its parts (predicted and measured), and what to
    reorder, drop or weaken."""
    state = served(model, state)
    check_job(CURRENT.get().policies, reads=True, adds_mandatory=True, param=("steering",))
    check_reading(body.steering)
    plan = await state.pools.complete(lambda: state.planner.plan(body.steering, None))
    program = _stack(plan)
    asked = body.prompts or list(PROMPTS)
    prompts = await state.texts.run(lambda: [_prompt(text, n, body.max_tokens, plan, state)
                                             for n, text in enumerate(asked)], sum(map(length_of, asked)))
    tokens = _tokens(prompts, program, body.max_tokens)
    if tokens > MOST_TOKENS:
        raise InvalidRequest(f"{tokens} tokens would go through the model, {MOST_TOKENS} may in one check",
                             param="prompts", fix="Give fewer or shorter ones.")
    for prompt in prompts:
        plan.check_prompt(prompt.token_ids, prompt.roles)
    subject = EngineSubject(state, asyncio.get_running_loop())
    estimate = await in_thread(lambda: seconds(tokens, subject, sample(subject)))
    texts = [Read(tuple(prompt.token_ids), prompt.roles) for prompt in prompts]

    async def work(control: Control) -> dict[str, Any]:
        subject.control = control
        try:
            found = await apart(lambda: check(program, _parts(plan), texts, body.max_tokens, subject, control.progress))
        except TrimtabError as error:
            raise plan.placed(error) from None
        return found.model_dump(mode="json")

    about = ", ".join(dict.fromkeys(item.source.ref for item in plan.planned if item.source is not None))
    return await submitted(state, "stack check", work, about=about or "inline numbers", estimate_s=estimate)


def _stack(plan: Plan) -> Program:
    """Raises InvalidRequest: there is nothing to compare."""
    acting = 0 if plan.program is None else sum(bool(item.rows) for item in plan.program.compiled)
    if plan.program is None or acting < 2:
        why = f"; the kill switch is on ({plan.disabled})" if plan.disabled is not None else ""
        raise InvalidRequest(f"{acting} of the interventions act{why}; a stack has at least two",
                             param=("steering", "interventions"),
                             fix="Give two or more with a strength other than 0, or a preset that has them.")
    return plan.program


def _parts(plan: Plan) -> list[Part]:
    assert plan.program is not None
    return [Part(op=compiled.op, artifact=compiled.applied.artifact, sites=list(compiled.applied.sites),
                 layers=list(compiled.applied.layers), origin=item.origin, kl=0.0)
            for item, compiled in zip(plan.planned, plan.program.compiled, strict=True)]


def _prompt(text: Text, n: int, max_tokens: int, plan: Plan, state: ServerState) -> Prompt:
    prompt = prompt_to_read(text, plan, state, ("prompts", n))
    context = state.engine.max_sequence_tokens
    if len(prompt.token_ids) + max_tokens > context:
        raise ContextLengthExceeded(context, f"the prompt has {len(prompt.token_ids)} and max_tokens is {max_tokens}",
                                    param=("prompts", n), fix="Shorten it.")
    return prompt


def _tokens(prompts: list[Prompt], program: Program, max_tokens: int) -> int:
    """That go through the model, at most."""
    parts = len(program.compiled)
    passes = 4 + parts + min(MOST_PAIRS, parts * (parts - 1) // 2) + 2 * MOST_ORDERS
    return passes * sum(len(prompt.token_ids) + max_tokens for prompt in prompts)
