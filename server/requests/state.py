"""What the routes share, made once per app."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Self, cast

from fastapi import Depends, Request

from server.activations.store import StoredActivations
from server.background.jobs import Jobs
from server.batches.batches import Batches
from server.batches.files import StoredFiles
from server.effects.live_grading import LiveGrading
from server.effects.shadow import Shadow
from server.effects.store import EffectStore
from server.engines.base import Engine
from server.engines.generation_config import SamplingDefaults
from server.engines.guests import Share
from server.history.history import History
from server.identity.keys import Keys
from server.identity.quotas import Quotas
from server.observability.metrics import Metrics
from server.requests.admission.queue import AdmissionQueue
from server.requests.guard import GuardMetrics
from server.requests.kept_receipts import KeptReceipts
from server.requests.killswitch import KillSwitch
from server.requests.monitor import MonitorMetrics
from server.requests.planner import Planner
from server.requests.pools import Pools
from server.requests.runs import Runs
from server.requests.steering_audit import SteeringAudit
from server.requests.stored.responses import StoredResponses
from server.rollouts.measuring import Measuring
from server.rollouts.rollouts import Rollouts
from server.rollouts.shadowing import ShadowArms
from server.settings import Settings
from server.text.dialect import Dialect
from server.text.pool import TextPool
from server.text.prompts import ChatPrompts
from server.text.vocabulary import Vocabulary
from vectors.library import Library


@dataclass(frozen=True)
class ServerState:
    settings: Settings
    engine: Engine
    engine_name: str
    library: Library
    vocabulary: Vocabulary
    chat_prompts: ChatPrompts
    dialect: Dialect
    planner: Planner
    metrics: Metrics
    jobs: Jobs
    shadow: Shadow
    live_grading: LiveGrading
    monitor_metrics: MonitorMetrics
    guard_metrics: GuardMetrics
    effect_store: EffectStore
    history: History
    queue: AdmissionQueue
    quotas: Quotas
    kill_switch: KillSwitch
    steering_audit: SteeringAudit
    keys: Keys
    rollouts: Rollouts
    rollout_measuring: Measuring
    shadow_arms: ShadowArms
    receipts: KeptReceipts
    responses: StoredResponses
    files: StoredFiles
    batches: Batches
    activations: StoredActivations
    share: Share
    sampling_defaults: SamplingDefaults
    runs: Runs = field(default_factory=Runs)
    # Responses that are being written, by id, so that they can be cancelled.
    running_responses: dict[str, Any] = field(default_factory=dict)
    texts: TextPool = field(default_factory=TextPool)
    pools: Pools = field(default_factory=Pools)

    def with_settings(self, settings: Settings) -> Self:
        return replace(self, settings=settings)


# This is a coroutine although it awaits nothing, because FastAPI runs plain functions in threads, and no request should
# wait for one.
async def get_state(request: Request) -> ServerState:
    return cast(ServerState, request.app.state.server)


State = Annotated[ServerState, Depends(get_state)]
