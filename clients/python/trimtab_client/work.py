"""Requests for jobs, for what the server offers, and for its switches."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

from trimtab_client.errors import JobFailed
from trimtab_client.flow import Call, Flow, Pause, Stream
from trimtab_client.models import (
    Calibrated,
    Collected,
    DefaultSpec,
    Extracted,
    Job,
    KillSwitch,
    LibraryUsage,
    Method,
    Page,
    ReloadedSettings,
    SettingsInForce,
)
from trimtab_client.reading import content_of, nothing, plain, reader

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


def version() -> Call[str]:
    """Which Trimtab the server is."""
    return Call("GET", "/version", lambda answer: str(json.loads(answer.content)["version"]))


def health() -> Call[None]:
    """Returns if the server can serve requests."""
    return Call("GET", "/health/ready", nothing)


def metrics() -> Call[str]:
    """Counters and gauges in Prometheus' text format."""
    return Call("GET", "/metrics", lambda answer: answer.content.decode())


def capabilities() -> Call[dict[str, Any]]:
    """Sites and ops that the loaded model offers, proven when the server started, and limits."""
    return Call("GET", "/v1/capabilities", plain)


def extraction_methods() -> Call[list[Method]]:
    """Every extraction method of the server, with what it takes."""
    return Call("GET", "/v1/extract/methods", lambda answer: reader(Page[Method])(answer).data)


def start_extraction(pairs: Iterable[Mapping[str, Any]] | None = None, *, name: str, method: str = "mean_difference",
                     **fields: Any) -> Call[Job]:
    """Begin to make an artifact by any method of `extraction_methods`; hyphens in its name are underscores.

    fields: as its schema names them, the data among them (`anchors=[...]`, `examples=[...]`). pairs: the field `pairs`,
    which many methods have: contrastive ones take `{"positive": ..., "negative": ..., "item": ...}`.
    """
    given = {} if pairs is None else {"pairs": [dict(pair) for pair in pairs]}
    return Call("POST", f"/v1/extract/{quote(method.replace('-', '_'), safe='')}", reader(Job),
                json={"name": name, **given, **fields})


def extract(pairs: Iterable[Mapping[str, Any]] | None = None, *, name: str, method: str = "mean_difference",
            on_progress: Callable[[Job], None] | None = None, **fields: Any) -> Flow[Extracted]:
    """As `start_extraction`, and wait for it. Raises JobFailed."""
    job: Job = yield start_extraction(pairs, name=name, method=method, **fields)
    done = yield from wait(job.id, on_progress=on_progress)
    return Extracted.model_validate(done.result)


def start_tuning(ref: str, **body: Any) -> Call[Job]:
    """Begin to choose layers and strength of a stored vector anew, by what the model writes.

    body: `trial` (effort, prompts, grader), `pairs`, `seed`, as the API has them.
    """
    return Call("POST", f"/v1/artifacts/{quote(ref, safe='@')}/tune", reader(Job), json=body)


def trial_picture(ref: str, *, format: Literal["png", "svg"] = "png") -> Call[bytes]:
    """What the trial of a vector found: success and broken texts by layers and strength, as a picture."""
    return Call("GET", f"/v1/artifacts/{quote(ref, safe='@')}/trial.{format}", content_of)


def start_calibration(ref: str, prompts: Sequence[Any], *, target: Mapping[str, Any] | None = None,
                      **options: Any) -> Call[Job]:
    """Begin to measure what an artifact does at which strength.

    prompts: neutral ones, texts or conversations. target: `{"prompts": [...], "scorer": {...}}`.
    """
    wanted = {} if target is None else {"target": dict(target)}
    return Call("POST", f"/v1/artifacts/{quote(ref, safe='@')}/calibrate", reader(Job),
                json={"prompts": list(prompts), **wanted, **options})


def calibrate(ref: str, prompts: Sequence[Any], *, target: Mapping[str, Any] | None = None,
              on_progress: Callable[[Job], None] | None = None, **options: Any) -> Flow[Calibrated]:
    """Measure what an artifact does at which strength, and wait for it. Raises JobFailed."""
    job: Job = yield start_calibration(ref, prompts, target=target, **options)
    done = yield from wait(job.id, on_progress=on_progress)
    return Calibrated.model_validate(done.result)


def calibration(ref: str) -> Call[dict[str, Any]]:
    """The curves of a calibrated artifact."""
    return Call("GET", f"/v1/artifacts/{quote(ref, safe='@')}/calibration", plain)


def calibration_plot(ref: str, *, format: Literal["png", "svg"] = "png", setting: int = 0) -> Call[bytes]:
    """The curves of one setting as a picture."""
    return Call("GET", f"/v1/artifacts/{quote(ref, safe='@')}/calibration.{format}", content_of,
                params={"setting": setting})


def start_evaluation(prompts: Sequence[Any], graders: Sequence[Mapping[str, Any]], *,
                     spec: Mapping[str, Any] | None = None, preset: str | None = None, **options: Any) -> Call[Job]:
    """Begin to grade what the model writes under a spec or preset, beside the untouched model and random artifacts.

    prompts: texts, conversations, or `{"prompt": ..., "expected": [...]}`. graders: `{"kind": "language", ...}`.
    options: doses, draws, controls, tasks, max_tokens, temperature, seed, samples.
    """
    named = {"spec": None if spec is None else dict(spec), "preset": preset}
    return Call("POST", "/v1/evaluations", reader(Job), json={
        "prompts": list(prompts), "graders": [dict(grader) for grader in graders],
        **{name: value for name, value in named.items() if value is not None}, **options})


def evaluate(prompts: Sequence[Any], graders: Sequence[Mapping[str, Any]], *, spec: Mapping[str, Any] | None = None,
             preset: str | None = None, on_progress: Callable[[Job], None] | None = None, **options: Any
             ) -> Flow[dict[str, Any]]:
    """As `start_evaluation`, and wait for it: the whole report. Raises JobFailed."""
    job: Job = yield start_evaluation(prompts, graders, spec=spec, preset=preset, **options)
    done = yield from wait(job.id, on_progress=on_progress)
    report: dict[str, Any] = yield evaluation((done.result or {})["id"])
    return report


def evaluations(ref: str | None = None, *, limit: int = 50) -> Call[Page[dict[str, Any]]]:
    """Summaries, newest first. ref: only of this artifact or preset version, `cheerful@3` say."""
    return Call("GET", "/v1/evaluations", reader(Page[dict[str, Any]]), params={"ref": ref, "limit": limit})


def evaluation(evaluation_id: str) -> Call[dict[str, Any]]:
    """One report, with texts."""
    return Call("GET", f"/v1/evaluations/{quote(evaluation_id, safe='')}", plain)


def evaluation_page(evaluation_id: str) -> Call[bytes]:
    """One report as an HTML page to read."""
    return Call("GET", f"/v1/evaluations/{quote(evaluation_id, safe='')}/report", content_of)


def evaluation_picture(evaluation_id: str, *, format: Literal["png", "svg"] = "png") -> Call[bytes]:
    """Shares at every dose, beside those of random artifacts, as a picture."""
    return Call("GET", f"/v1/evaluations/{quote(evaluation_id, safe='')}/picture.{format}", content_of)


def delete_evaluation(evaluation_id: str) -> Call[None]:
    return Call("DELETE", f"/v1/evaluations/{quote(evaluation_id, safe='')}", nothing)


def effects(*, group: Literal["artifact", "preset", "minute", "tenant", "arm", "all"] = "all",
            artifact: str | None = None, preset: str | None = None, tenant: str | None = None,
            rollout: str | None = None, arm: Literal["stable", "candidate"] | None = None, since: int | None = None,
            until: int | None = None, limit: int = 100) -> Call[dict[str, Any]]:
    """What interventions did, measured in production: `{"data": [...], "outcomes": [...]}`, largest KL first, and what
    graded answers were.

    artifact: reference with version, "inline", or "all" for whole specs. rollout: only completions of the arms of this
    one. arm: together with a roll-out, or with the group "arm". since, until: seconds since 1970.
    """
    return Call("GET", "/v1/effects", plain, params={
        "group": group, "artifact": artifact, "preset": preset, "tenant": tenant, "rollout": rollout, "arm": arm,
        "since": since, "until": until, "limit": limit})


def history(*, since: int | None = None, until: int | None = None, bucket_s: int | None = None) -> Call[dict[str, Any]]:
    """What was counted, in buckets: traffic, latency, load, refusals. since, until: seconds since 1970."""
    return Call("GET", "/v1/history", plain, params={"since": since, "until": until, "bucket_s": bucket_s})


def live() -> Flow[Stream[dict[str, Any]]]:
    """The same as it happens, every few seconds, until the iteration is left."""
    yield from ()
    return Stream("GET", "/v1/live", json.loads)


def alerts() -> Call[dict[str, Any]]:
    """What stands out now: `{"data": [...]}`, what fires first."""
    return Call("GET", "/v1/alerts", plain)


def jobs() -> Call[Page[Job]]:
    """Newest first."""
    return Call("GET", "/v1/jobs", reader(Page[Job]))


def get_job(job_id: str) -> Call[Job]:
    return Call("GET", f"/v1/jobs/{quote(job_id, safe='')}", reader(Job))


def cancel_job(job_id: str) -> Call[Job]:
    """Ask a job to stop."""
    return Call("POST", f"/v1/jobs/{quote(job_id, safe='')}/cancel", reader(Job))


def wait(job_id: str, *, on_progress: Callable[[Job], None] | None = None) -> Flow[Job]:
    """Wait until a job has succeeded. Raises JobFailed if it fails or is cancelled."""
    pause = FIRST_PAUSE_S
    while True:
        job: Job = yield get_job(job_id)
        if on_progress is not None:
            on_progress(job)
        if job.status == "succeeded":
            return job
        if job.finished:
            error = job.error or {}
            raise JobFailed(str(error.get("message") or f"the job was {job.status}"), job_id=job_id,
                            code=error.get("code"), param=error.get("param"))
        yield Pause(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def default_spec() -> Call[DefaultSpec]:
    """The spec that acts first in every request that does not say otherwise."""
    return Call("GET", "/v1/admin/default-spec", reader(DefaultSpec))


def set_default_spec(spec: Mapping[str, Any]) -> Call[DefaultSpec]:
    """spec: `{"interventions": [...]}` or `{"preset": NAME}`."""
    return Call("PUT", "/v1/admin/default-spec", reader(DefaultSpec), json=dict(spec))


def clear_default_spec() -> Call[DefaultSpec]:
    return Call("DELETE", "/v1/admin/default-spec", reader(DefaultSpec))


def library() -> Call[LibraryUsage]:
    """What the library holds, and its limits."""
    return Call("GET", "/v1/admin/library", reader(LibraryUsage))


def collect_library(*, min_age_s: float = 3600.0) -> Call[Collected]:
    """Remove from the storage what deleted versions and crashes left, if at least so old."""
    return Call("POST", "/v1/admin/library/gc", reader(Collected), params={"min_age_s": min_age_s})


def settings() -> Call[SettingsInForce]:
    """What the server was started with, and the versions of what runs; without secrets."""
    return Call("GET", "/v1/admin/settings", reader(SettingsInForce))


def reload_settings() -> Call[ReloadedSettings]:
    """Have the server read its file with settings and its secrets again, and take over what it can."""
    return Call("POST", "/v1/admin/settings/reload", reader(ReloadedSettings))


def kill_switch() -> Call[KillSwitch]:
    return Call("GET", "/v1/admin/kill-switch", reader(KillSwitch))


def set_kill_switch(on: bool) -> Call[KillSwitch]:
    """True turns all steering off until it is turned off again."""
    return Call("PUT", "/v1/admin/kill-switch", reader(KillSwitch), json={"on": on})
