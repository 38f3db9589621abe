"""Calibration: `POST /v1/artifacts/{ref}/calibrate`, and what it left as JSON and as pictures."""

import asyncio
import hashlib
import json
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response

from server.api.library.of_model import OfModel, served
from server.api.library.refs import REF
from server.api.route import StrictRoute
from server.background.apart import apart
from server.background.job import Cancelled, Control, Job
from server.identity.principal import CURRENT
from server.requests.policy_gate import check_job
from server.requests.state import ServerState, State
from server.requests.submitting import submitted
from server.threads import in_thread
from server.workbench.subject import EngineSubject, sample
from steering.artifacts.source import Source
from steering.language.errors import InvalidRequest, NotFound
from vectors.artifact import Artifact
from vectors.calibrate.known import Known
from vectors.calibrate.options import CalibrateOptions
from vectors.calibrate.plot import draw
from vectors.calibrate.refusals import CalibrationCancelled
from vectors.calibrate.run import calibrate, estimated
from vectors.calibration import Calibration, calibration_of
from vectors.library.naming import check_changed

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], route_class=StrictRoute)
MEDIA = {"png": "image/png", "svg": "image/svg+xml"}


@router.post(f"/{REF}/calibrate", status_code=202)
async def create_calibration(ref: str, body: CalibrateOptions, state: State, model: OfModel = None) -> Job:
    """Start the job. What it measures goes into the card of this version, where doses are read from. Doses hold for the
    model itself, so an adapter is refused."""
    if served(model, state) is not state:
        raise InvalidRequest("doses are of the model itself, and one measured on an adapter would be taken for its own",
                             param="model", fix="Tune the artifact on the adapter, which stores a version with a "
                             f"strength of its own: POST /v1/artifacts/{ref}/tune?model=ADAPTER.")
    artifact = await in_thread(state.library.resolve, ref)
    check_changed(artifact.metadata.name, "ref")
    check_job(CURRENT.get().policies, artifact.ref, op=artifact.metadata.op, site=artifact.metadata.site,
              param=("ref",))
    subject = EngineSubject(state, asyncio.get_running_loop())
    estimate = await in_thread(estimated, body, subject, sample(subject))
    return await submitted(state, "calibrate", lambda control: _work(artifact.ref, body, control, state),
                           about=artifact.ref, estimate_s=estimate)


@router.get(f"/{REF}/calibration")
def show_calibration(ref: str, state: State) -> Calibration:
    """The measured curves, a setting each."""
    return _calibration(state.library.resolve(ref))


@router.get(f"/{REF}/calibration.{{format}}", response_class=Response,
            responses={200: {"content": {"image/png": {}, "image/svg+xml": {}}, "description": "The plot."}})
def draw_calibration(ref: str, format: Annotated[Literal["png", "svg"], Path()], state: State,
                     setting: Annotated[int, Query(ge=0, le=1000, description="Number of the setting.")] = 0
                     ) -> Response:
    """The curves of one setting as a picture, with the placebo floor."""
    artifact = state.library.resolve(ref)
    settings = _calibration(artifact).settings
    if setting >= len(settings):
        raise NotFound(f"{artifact.ref} has {len(settings)} calibrated settings", param="setting",
                       fix=f"Use 0 to {len(settings) - 1}.")
    return Response(draw(settings[setting], artifact.ref, format), media_type=MEDIA[format])


async def _work(ref: str, options: CalibrateOptions, control: Control, state: ServerState) -> dict[str, Any]:
    bench = EngineSubject(state, asyncio.get_running_loop(), control)

    def work() -> dict[str, Any]:
        artifact, source = state.library.resolve(ref), state.library.source(ref)
        former = calibration_of(artifact.metadata.card)
        known = Known(_kept(source, options, state))
        settings = calibrate(source, options, bench, control.progress, control.cancelled,
                             () if former is None else former.settings, known)
        control.check()
        stored = state.library.add_calibration(ref, settings)
        known.forget()
        return {"artifact": stored.ref, "settings": [setting.model_dump(mode="json") for setting in settings]}

    try:
        return await apart(work)
    except CalibrationCancelled:
        raise Cancelled from None


def _kept(source: Source, options: CalibrateOptions, state: ServerState) -> FilePath:
    """Where completions are kept until the calibration is done: one that was cut off goes on from there when it is
    asked for again, also with other strengths or draws."""
    same = options.model_dump(mode="json", include={"prompts", "target", "max_tokens", "temperature", "seed"})
    content = json.dumps([source.digest, state.engine.facts.fingerprint, same], sort_keys=True)
    return state.jobs.folder / f"calibrate-{hashlib.sha256(content.encode()).hexdigest()[:32]}.jsonl"


def _calibration(artifact: Artifact) -> Calibration:
    found = calibration_of(artifact.metadata.card)
    if found is None:
        raise NotFound(f"{artifact.ref} has no calibration", param="ref",
                       fix=f"Run: trimtab calibrate {artifact.ref} --prompts FILE")
    return found
