"""`/v1/evaluations`: what the texts under a spec are, beside the untouched model and random artifacts of equal size."""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field, model_validator

from server.api.library.of_model import OfModel, served
from server.api.route import StrictRoute
from server.background.apart import apart
from server.background.job import Control, Job
from server.identity.principal import CURRENT
from server.requests.plan import Plan
from server.requests.policy_gate import check_job
from server.requests.state import ServerState, State
from server.requests.submitting import submitted
from server.threads import in_thread
from server.workbench.subject import EngineSubject, sample
from steering.artifacts.source import Resolved
from steering.language.errors import InvalidRequest, NotFound, TrimtabError
from steering.language.fields import ArtifactRef
from steering.language.spec import Spec
from steering.programs.reading import compile_reader
from vectors.evaluate.graders.contract import Tools
from vectors.evaluate.graders.llm_judge import LlmJudge
from vectors.evaluate.graders.probe import ProbeGrader
from vectors.evaluate.options import EvaluateOptions, Question
from vectors.evaluate.page import POLICY, page
from vectors.evaluate.picture import draw
from vectors.evaluate.reads import reads
from vectors.evaluate.report import ArmView, EvaluationReport, EvaluationSummary, doses_of
from vectors.evaluate.run import Asked, Evaluation, Options, evaluate
from vectors.extract.subject import Prompt, Turn
from vectors.extract.trial.effort import seconds

router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"], route_class=StrictRoute)
MEDIA = {"png": "image/png", "svg": "image/svg+xml"}
SHOWN_CHARACTERS = 500


class EvaluateBody(EvaluateOptions):
    """Which spec, and how it is evaluated."""

    spec: Spec | None = Field(default=None, description="The interventions. Numbers given inline have no random "
                              "counterpart and need `draws: 0`.")
    preset: ArtifactRef | None = Field(default=None, description="A stored spec instead.")

    @model_validator(mode="after")
    def _one_of(self) -> "EvaluateBody":
        if (self.spec is None) == (self.preset is None):
            raise ValueError("give either spec or preset")
        return self


class EvaluationList(BaseModel):
    data: list[EvaluationSummary]


@router.post("", status_code=202)
async def create_evaluation(body: EvaluateBody, state: State, model: OfModel = None) -> Job:
    """Start the job. Its result is the summary; the report with its texts is kept under the summary's id."""
    state = served(model, state)
    check_job(CURRENT.get().policies, adds_mandatory=True)
    _check_judges(body, state)
    plan, preset = await in_thread(_plan, body, state)
    mandatory = await in_thread(state.planner.mandatory)
    tools = await in_thread(_tools, body, state)
    subject = EngineSubject(state, asyncio.get_running_loop())
    estimate = await in_thread(lambda: seconds(_tokens(body, subject), subject, sample(subject)))
    return await submitted(state, "evaluate",
                           lambda control: _work(body, plan, mandatory, preset, tools, control, state),
                           about=_about(plan, preset), estimate_s=estimate)


@router.get("")
async def list_evaluations(
    state: State, limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    ref: Annotated[ArtifactRef | None, Query(description="Only of this artifact or preset version.")] = None,
) -> EvaluationList:
    """Newest first."""
    found = await in_thread(lambda: state.library.evaluations.list(ref, limit))
    return EvaluationList(data=[EvaluationSummary.model_validate(one) for one in found])


@router.get("/{id}")
async def show_evaluation(id: str, state: State) -> EvaluationReport:
    return await in_thread(_report, id, state)


@router.get("/{id}/report", response_class=HTMLResponse)
async def show_evaluation_report(id: str, state: State) -> HTMLResponse:
    """The report as a page to read, with pictures and texts of every arm side by side."""
    text = await in_thread(lambda: page(_report(id, state)))
    return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})


@router.get("/{id}/picture.{format}", response_class=Response,
            responses={200: {"content": {"image/png": {}, "image/svg+xml": {}}, "description": "The picture."}})
async def draw_evaluation(id: str, format: Annotated[Literal["png", "svg"], Path()], state: State) -> Response:
    """Shares at every dose beside those of random artifacts, as a picture."""
    picture = await in_thread(lambda: draw(_report(id, state), format))
    return Response(picture, media_type=MEDIA[format])


@router.delete("/{id}", status_code=204)
async def delete_evaluation(id: str, state: State) -> None:
    await in_thread(state.library.evaluations.delete, id)


async def _work(body: EvaluateBody, plan: Plan, mandatory: Plan, preset: str | None, tools: Tools, control: Control,
                state: ServerState) -> dict[str, Any]:
    bench = EngineSubject(state, asyncio.get_running_loop(), control)
    # One of the job, so that a job which a server finished and could not say so is not done a second time.
    id = f"eval-{control.job_id.removeprefix('job-')}"

    def work() -> dict[str, Any]:
        with suppress(NotFound):
            return _report(id, state).summary().model_dump(mode="json")
        for grader in body.graders:
            if isinstance(grader, ProbeGrader):
                tools.probes[grader.probe] = reads(
                    compile_reader(state.library.source(grader.probe), state.engine.facts), bench)
        found = evaluate(plan.planned, [_asked(one) for one in body.prompts], body.graders, bench,
                         _options(body, plan, mandatory), tools, control.progress)
        control.check()
        report = _reported(id, body, plan.planned, mandatory.planned, preset, found, state)
        summary = report.summary().model_dump(mode="json")
        state.library.evaluations.add(report.id, report.created_at, [*report.artifacts, *([preset] if preset else [])],
                                      summary, report.model_dump_json())
        return summary

    return await apart(work)


def _tokens(body: EvaluateBody, subject: EngineSubject) -> int:
    """That go through the model, about: an answer is written, and then run again under the program and without."""
    prompts = [_asked(one).prompt for one in (*body.prompts, *body.controls, *body.tasks)]
    arm = sum(2 * len(subject.encode(prompt)) + 3 * body.max_tokens for prompt in prompts)
    return arm * (1 + len(body.doses) * (1 + body.draws))


def _about(plan: Plan, preset: str | None) -> str:
    named = [one.source.ref for one in plan.planned if one.source is not None]
    return preset or ", ".join(dict.fromkeys(named)) or "inline numbers"


def _plan(body: EvaluateBody, state: ServerState) -> tuple[Plan, str | None]:
    """The compiled spec and, of a preset, its version."""
    preset = None if body.preset is None else state.library.presets.resolve(body.preset)
    if preset is not None:
        plan = state.planner.check_preset(preset)
    else:
        assert body.spec is not None
        try:
            plan = state.planner.check_spec(body.spec)
        except TrimtabError as error:
            raise error.at("spec") from None
    if not plan.planned:
        raise InvalidRequest("the spec has no intervention", param=("spec", "interventions"))
    if body.draws and any(one.source is None for one in plan.planned):
        raise InvalidRequest("numbers given inline have no random counterpart", param="draws",
                             fix="Store them as an artifact, or set draws to 0.")
    return plan, None if preset is None else preset.ref


def _check_judges(body: EvaluateBody, state: ServerState) -> None:
    """A judge is asked over the network by the server: only where the operator allows it."""
    for n, grader in enumerate(body.graders):
        if isinstance(grader, LlmJudge) and not _below(str(grader.url), state.settings.judge_urls):
            raise InvalidRequest(f"this server may not ask a judge at {grader.url}", param=("graders", n, "url"),
                                 fix="Start it with TRIMTAB_JUDGE_URLS, a JSON list of URLs that it may ask.")


def _below(url: str, allowed: tuple[str, ...]) -> bool:
    """Whether a URL is one of those allowed, or below one: whole parts of a path, so that no other host begins so."""
    return any(f"{url.rstrip('/')}/".startswith(f"{beginning.rstrip('/')}/") for beginning in allowed)


def _tools(body: EvaluateBody, state: ServerState) -> Tools:
    """Probes are read before the job is taken, so that a wrong name is refused at once."""
    for n, grader in enumerate(body.graders):
        if isinstance(grader, ProbeGrader):
            try:
                compile_reader(state.library.source(grader.probe), state.engine.facts)
            except TrimtabError as error:
                raise error.about("graders", n, "probe") from None
    return Tools()


def _options(body: EvaluateBody, plan: Plan, mandatory: Plan) -> Options:
    return Options(doses=tuple(body.doses), draws=body.draws, max_tokens=body.max_tokens, temperature=body.temperature,
                   seed=body.seed, samples=body.samples, controls=tuple(body.controls),
                   tasks=tuple(_asked(one) for one in body.tasks), before=mandatory.planned,
                   names_roles=plan.names_roles or mandatory.names_roles)


def _asked(one: Question | Prompt) -> Asked:
    return Asked(one.prompt, tuple(one.expected)) if isinstance(one, Question) else Asked(one)


def _reported(id: str, body: EvaluateBody, resolved: tuple[Resolved, ...], mandatory: tuple[Resolved, ...],
              preset: str | None, found: Evaluation, state: ServerState) -> EvaluationReport:
    given = {"preset": preset} if body.spec is None else body.spec.model_dump(mode="json", exclude_defaults=True)
    return EvaluationReport(
        id=id, created_at=datetime.now(UTC), model=_evaluated(state),
        fingerprint=state.engine.facts.fingerprint, engine=state.engine_name, spec=given,
        artifacts=list(dict.fromkeys(one.source.ref for one in resolved if one.source is not None)), preset=preset,
        mandatory=["inline" if one.source is None else one.source.ref for one in mandatory],
        graders=[grader.model_dump(mode="json") for grader in body.graders], prompts=len(body.prompts),
        controls=len(body.controls), tasks=len(body.tasks), doses=list(body.doses), draws=body.draws,
        max_tokens=body.max_tokens, temperature=body.temperature, seed=body.seed,
        shown=[_shown(_asked(one).prompt) for one in body.prompts[:body.samples]],
        untouched=ArmView.of(found.untouched),
        results=doses_of(found, "with the mandatory spec alone" if mandatory else "untouched"))


def _evaluated(state: ServerState) -> str:
    """The name of the model or, with its digest, of the adapter that was on it."""
    return state.engine.facts.adapter or state.settings.model_name


def _shown(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt[:SHOWN_CHARACTERS]
    said = "\n".join(f"{turn.role}: {turn.content}" for turn in prompt if isinstance(turn, Turn))
    return (said or f"{len(prompt)} token ids")[:SHOWN_CHARACTERS]


def _report(id: str, state: ServerState) -> EvaluationReport:
    return EvaluationReport.model_validate(state.library.evaluations.report(id))
