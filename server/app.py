"""The application: everything made once, joined, and started and stopped with the server."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import httpx
from fastapi import FastAPI
from starlette.types import Lifespan, Receive, Scope, Send

from server.activations.store import StoredActivations
from server.api import activations, checks, console, features, lens, receipts, specs
from server.api.admin import adapters, audit, capabilities, docs, effects, health, history, jobs, policies
from server.api.admin import keys as access_keys
from server.api.admin import requirements as requirement_routes
from server.api.admin import rollouts as rollout_routes
from server.api.admin import settings as settings_in_force
from server.api.admin import switches as admin
from server.api.anthropic import messages
from server.api.library import artifacts, calibration, evaluations, extract, port, presets
from server.api.openai import batches as batch_routes
from server.api.openai import chat, completions, files, models, responses, tokens
from server.background.apart import apart
from server.background.board import Asked, Board
from server.background.housekeeping import Housekeeping
from server.background.job import Job
from server.background.jobs import Jobs
from server.background.sharing import Sharing
from server.batches.batches import Batches
from server.batches.files import StoredFiles
from server.effects.live_grading import LiveGrading
from server.effects.metrics import EffectMetrics, OutcomeMetrics
from server.effects.shadow import Shadow
from server.effects.store import EffectStore
from server.engines.base import Engine
from server.engines.generation_config import SamplingDefaults
from server.engines.guests import Share
from server.engines.massive import massive_of
from server.history.history import History
from server.history.store import HistoryStore
from server.http.answers import JsonAnswer
from server.http.cors import add_cors
from server.http.frame import RequestFrame
from server.http.handlers import add_handlers
from server.http.open_requests import OpenRequests
from server.identity.counters import Counters, LocalCounters
from server.identity.keys import Keys
from server.identity.principal import PRINCIPAL, Principal
from server.identity.quotas import Quotas
from server.identity.shared_counters import SharedCounters
from server.identity.tokens import Tokens
from server.observability.export import open_tracing
from server.observability.instruments import Registry
from server.observability.metrics import Metrics
from server.observability.routing import RoutingMetrics
from server.requests.admission.caller import BATCH
from server.requests.admission.queue import AdmissionQueue
from server.requests.following import Following
from server.requests.guard import GuardMetrics
from server.requests.kept_receipts import KeptReceipts
from server.requests.killswitch import KillSwitch
from server.requests.monitor import MonitorMetrics
from server.requests.planner import Planner
from server.requests.rehearsal import try_default_spec
from server.requests.reload import Reloading, provider_of
from server.requests.runs import Runs
from server.requests.state import ServerState
from server.requests.steering_audit import SteeringAudit
from server.requests.stored.responses import StoredResponses
from server.requests.submitting import AGAIN
from server.rollouts.measuring import Measuring
from server.rollouts.rollouts import Rollouts
from server.rollouts.shadowing import ShadowArms
from server.settings import Settings
from server.text.dialect import Dialect
from server.text.prompts import ChatPrompts
from server.text.vocabulary import Vocabulary
from server.threads import in_thread
from vectors.evaluate.graders.named import text_graders
from vectors.library import Library


class Service(Protocol):
    """What runs as long as the server does. `stop` may be called after a `start` that failed."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


ROUTERS = (chat.router, completions.router, responses.router, files.router, batch_routes.router, messages.router,
           receipts.router, tokens.router, models.router, artifacts.router, calibration.router, port.router,
           presets.router, capabilities.router, extract.router, evaluations.router, jobs.router, effects.router,
           history.router, lens.router, features.router, activations.router, checks.router, specs.router, admin.router,
           adapters.router, access_keys.router, audit.router, policies.router, rollout_routes.router,
           requirement_routes.router, settings_in_force.router)
DESCRIPTION = "Inference-time steering behind OpenAI's API: each request may carry a `steering` field."


def create_app(settings: Settings, engine: Engine, library: Library, vocabulary: Vocabulary, *,
               engine_name: str = "transformers", again: Callable[[], Settings] | None = None,
               sampling_defaults: SamplingDefaults | None = None) -> FastAPI:
    """
    Args:
        engine: started and stopped with the app.
        library: closed with the app.
        vocabulary: of the engine's model.
        engine_name: as receipts state it.
        again: reads the settings again, when the server is told to; without it they stay as they are.
        sampling_defaults: of the model.
    """
    metrics = Metrics()
    owner = None if settings.api_key is None else settings.api_key.get_secret_value().encode()
    tokens = tokens_of(settings, metrics.registry)
    keys = Keys(library.keys, owner, metrics.registry, policies=library.policies, tokens=tokens)
    quotas = Quotas(counters_of(settings, metrics.registry), metrics.registry)
    queue = AdmissionQueue(metrics.registry, places=settings.max_requests, most_requests=settings.queue_requests,
                           most_tokens=settings.queue_tokens, weight=keys.weight)

    tracing = open_tracing(settings.trace_endpoint, settings.trace_sample, settings.trace_queue)
    runs = Runs()
    metrics.before_reading.append(RoutingMetrics(metrics.registry, engine, lambda: queue.waiting,
                                                 runs.model_names).refresh)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        # Each part is stopped if it began to start, the last one first, whatever another's start or stop raises.
        async with AsyncExitStack() as parts:
            parts.push_async_callback(in_thread, library.close)
            if tracing is not None:
                parts.push_async_callback(tracing.stop)
            await parts.enter_async_context(_running(engine))
            engine.facts = replace(engine.facts, massive=await massive_of(
                engine, partial(vocabulary.encode, special_tokens=True)))
            store = EffectStore(settings.effect_store_url)
            parts.callback(store.close)
            counted = HistoryStore(settings.history_url, kept_s=settings.history_kept_s)
            parts.callback(counted.close)
            responses = StoredResponses(settings.responses_url, seconds=settings.responses_kept_s,
                                        most_bytes=settings.responses_kept_bytes)
            parts.callback(responses.close)
            await parts.enter_async_context(_running(keys))
            await parts.enter_async_context(_running(quotas))
            if tokens is not None:
                await parts.enter_async_context(_running(tokens))
            kill_switch = KillSwitch(library.switches, metrics.registry, always=settings.kill_switch)
            await parts.enter_async_context(_running(kill_switch))
            # Names are those of this model from here on, also those that are rolled out.
            library.serve(engine.facts.fingerprint)
            rollouts = Rollouts(library.rollouts, metrics.registry)
            await parts.enter_async_context(_running(rollouts))
            await parts.enter_async_context(_running(Following(
                library, metrics.registry, [keys.wake, kill_switch.wake, rollouts.wake])))
            shadow = Shadow(engine, EffectMetrics(metrics.registry, settings.model_name), store,
                            sample=settings.shadow_sample, budget=settings.shadow_budget, decode=vocabulary.decode,
                            end_ids=vocabulary.end_ids)
            await parts.enter_async_context(_running(shadow))
            live_grading = LiveGrading(OutcomeMetrics(metrics.registry, settings.model_name), store,
                                       text_graders(settings.outcome_graders), apart,
                                       sample=settings.outcome_sample, measured=settings.shadow_sample)
            await parts.enter_async_context(_running(live_grading))
            rollout_measuring = Measuring(rollouts, apart, metrics.registry)
            await parts.enter_async_context(_running(rollout_measuring))
            shadow_arms = ShadowArms(rollouts, rollout_measuring, lambda: engine.stats().get("waiting", 0) > 0,
                                     metrics.registry)
            await parts.enter_async_context(_running(shadow_arms))
            record = History(engine, metrics, counted if settings.history_kept_s else None)
            await parts.enter_async_context(_running(record))
            share = Share(lambda: queue.running > 0)
            board = None if settings.shared_database_url is None else Board(settings.shared_database_url)
            if board is not None:
                parts.callback(board.close)
            jobs = Jobs(settings.data_dir / "jobs", settings.max_jobs, share, board)
            parts.push_async_callback(jobs.stop)
            await in_thread(jobs.load)
            captured = StoredActivations(settings.data_dir / "activations", most_bytes=settings.activations_bytes,
                                         seconds=settings.activations_kept_s)
            await parts.enter_async_context(_running(Housekeeping(
                library, metrics.registry, settings.gc_interval_s, audit_kept_s=settings.audit_kept_s,
                more=(captured.sweep,))))
            steering_audit = SteeringAudit(library.audit, metrics.registry, vocabulary.decode, settings)
            await parts.enter_async_context(_running(steering_audit))
            stored = StoredFiles(settings.data_dir / "files", most_bytes=settings.files_bytes,
                                 seconds=settings.files_kept_s)
            batches = Batches(settings.data_dir / "batches", stored, partial(_own_client, app),
                              at_once=settings.batch_at_once, most_lines=settings.batch_lines,
                              most_open=settings.max_jobs)
            dialect = Dialect(vocabulary, tools=settings.tool_parser, thoughts=settings.reasoning_parser)
            # After the engine's start: the self-test has narrowed the facts to what it reached.
            app.state.server = state = ServerState(
                settings=settings, engine=engine, engine_name=engine_name, library=library, vocabulary=vocabulary,
                chat_prompts=ChatPrompts(vocabulary, control_in_messages=settings.control_in_messages),
                dialect=dialect, metrics=metrics,
                planner=Planner(settings, library, engine.facts, kill_switch, captured,
                                dialect.sections(tools=False)),
                kill_switch=kill_switch, keys=keys, rollouts=rollouts, rollout_measuring=rollout_measuring,
                shadow_arms=shadow_arms, jobs=jobs, shadow=shadow,
                live_grading=live_grading, monitor_metrics=MonitorMetrics(metrics.registry),
                guard_metrics=GuardMetrics(metrics.registry), effect_store=store, history=record,
                steering_audit=steering_audit, queue=queue, quotas=quotas, responses=responses, files=stored,
                batches=batches, activations=captured,
                receipts=KeptReceipts(most_bytes=settings.receipts_kept_bytes, seconds=settings.receipts_kept_s),
                share=share, sampling_defaults=sampling_defaults or SamplingDefaults(), runs=runs)
            await reloading.remember()
            await try_default_spec(state)
            if board is not None:
                sharing = Sharing(jobs, board, metrics.registry, partial(_again, app))
                app.state.sharing = sharing
                await parts.enter_async_context(_running(sharing))
            await parts.enter_async_context(_running(batches))
            yield

    app = routed(lifespan)
    app.state.open_requests = open_requests = OpenRequests()
    app.state.metrics = metrics
    app.state.reloading = reloading = Reloading(app, again or (lambda: settings))
    app.add_middleware(RequestFrame, settings=settings, metrics=metrics, open_requests=open_requests, keys=keys,
                       tracing=tracing)
    add_handlers(app, metrics)
    add_cors(app, settings)
    return app


@asynccontextmanager
async def _running(service: Service) -> AsyncIterator[None]:
    try:
        await service.start()
        yield
    finally:
        await service.stop()


def _own_client(app: FastAPI, batch_id: str, who: Principal) -> httpx.AsyncClient:
    """A client of this server that goes through all that others go through, and comes after them. It may do what `who`
    may."""

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, BATCH: batch_id, PRINCIPAL: who}, receive, send)

    # The bounds of time are those of the server.
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=asked, raise_app_exceptions=False, client=(batch_id, 0)),
                             base_url="http://localhost", timeout=None)


def tokens_of(settings: Settings, registry: Registry) -> Tokens | None:
    """Of the OpenID provider whose tokens count, if there is one."""
    provider = provider_of(settings)
    return None if provider is None else Tokens(provider, registry)


def counters_of(settings: Settings, registry: Registry) -> Counters:
    """Where the quotas are counted."""
    if settings.quota_store_url is None:
        return LocalCounters()
    return SharedCounters(settings.quota_store_url.get_secret_value(), registry,
                          timeout_s=settings.quota_store_timeout_s)


def _again(app: FastAPI, job: Job, asked: Asked) -> httpx.AsyncClient:
    """A client of this server whose request begins a job again, for whom it was asked first."""
    told = asked.who
    who = Principal(told["name"], told["tenant"], frozenset(told["roles"]), told["key_id"])

    async def once_more(scope: Scope, receive: Receive, send: Send) -> None:
        AGAIN.set(job)
        await app({**scope, PRINCIPAL: who}, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(app=once_more, raise_app_exceptions=False,
                                                           client=(job.id, 0)),
                             base_url="http://localhost", timeout=None)


def routed(lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The routes alone; enough to describe the API."""
    app = FastAPI(title="Trimtab", version="1", description=DESCRIPTION, lifespan=lifespan, redirect_slashes=False,
                  openapi_url=None, docs_url=None, redoc_url=None,
                  default_response_class=JsonAnswer,
                  generate_unique_id_function=lambda route: route.name)
    app.include_router(health.router)
    app.include_router(docs.router)
    app.include_router(console.router)
    responses: dict[int | str, dict[str, Any]] = {"4XX": {"model": health.ErrorBody, "description": "Refused."},
                                                  "5XX": {"model": health.ErrorBody, "description": "Failed."}}
    for router in ROUTERS:
        app.include_router(router, responses=responses)
    return app
