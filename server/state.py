"""What the routes share, made once per app."""

from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request

from server.admission.queue import AdmissionQueue
from server.effects.shadow import Shadow
from server.effects.store import EffectStore
from server.engines.base import Engine
from server.guard import GuardMetrics
from server.jobs import Jobs
from server.killswitch import KillSwitch
from server.metrics import Metrics
from server.monitor import MonitorMetrics
from server.openai.prompts import ChatPrompts
from server.openai.runs import Runs
from server.openai.textpool import TextPool
from server.openai.vocabulary import Vocabulary
from server.planner import Planner
from server.pools import Pools
from server.settings import Settings
from vectors.library import Library


@dataclass(frozen=True)
class ServerState:
    settings: Settings
    engine: Engine
    engine_name: str
    library: Library
    vocabulary: Vocabulary
    chat_prompts: ChatPrompts
    planner: Planner
    metrics: Metrics
    jobs: Jobs
    shadow: Shadow
    monitor_metrics: MonitorMetrics
    guard_metrics: GuardMetrics
    effect_store: EffectStore
    queue: AdmissionQueue
    kill_switch: KillSwitch
    runs: Runs = field(default_factory=Runs)
    texts: TextPool = field(default_factory=TextPool)
    pools: Pools = field(default_factory=Pools)


# A coroutine, although nothing is awaited: what every request needs must not wait for a thread.
async def get_state(request: Request) -> ServerState:
    return cast(ServerState, request.app.state.server)


State = Annotated[ServerState, Depends(get_state)]
