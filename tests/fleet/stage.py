"""What the fleet holds at first, and how it is changed: every change is kept beside the time at which it counts."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fleet.cluster import FIRST, OWNER, Fleet
from tests.fleet.heartbeat import Heartbeat
from tests.fleet.load import Answer, Asker, Log, now
from tests.fleet.timelines import Change, Timeline

# A change is to act everywhere within this many seconds.
GRACE_S = 1.0
LAYER, WIDTH = "2", 128
# Tenants and the roles of their first key. `blue` has policies, `green` asks for what is rolled out, `small` has a
# quota, and `maker` stores artifacts and has jobs done.
TENANTS = {"blue": ["infer"], "green": ["infer"], "small": ["infer"],
           "maker": ["library_read", "library_write", "jobs"]}
A_MINUTE, AT_ONCE = 60, 2
OPEN, BLOCKED, ABSENT = "open", "blocked", "absent"
FREE, FORBIDDEN = "free", "forbidden"
NONE = "none"
# What is in force of a policy, in the words of its timeline, and the document that says so.
POLICIES: dict[str, dict[str, Any]] = {
    FREE: {}, FORBIDDEN: {"artifacts": ["other*"]},
    "must@1": {"mandatory": {"interventions": [{"artifact": "must@1"}]}},
    "must@2": {"mandatory": {"interventions": [{"artifact": "must@2"}]}}}


@dataclass
class Made:
    """An artifact that was acknowledged."""

    ref: str
    digest: str
    numbers: list[float]


@dataclass
class Stage:
    """
    Attributes:
        serving: the replicas that are asked for changes, in turn.
        keys: of tenants, and of those that come and go.
        outages: when the database was away, from before it was told to stop until it answered again.
        ends: when a replica was killed, or told to stop.
        arms: the shares of a roll-out that are known, by its id.
    """

    fleet: Fleet
    log: Log
    heartbeat: Heartbeat
    asks: dict[str, Asker]
    front: Asker
    serving: list[str] = field(default_factory=lambda: list(FIRST))
    timelines: dict[str, Timeline] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    passing: list[str] = field(default_factory=list)
    outages: list[tuple[float, float]] = field(default_factory=list)
    ends: dict[str, float] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)
    rollout: str = ""
    noted: str = ""
    _turn: int = 0

    def next(self) -> str:
        self._turn += 1
        return self.serving[self._turn % len(self.serving)]

    def timeline(self, name: str, first: Any) -> Timeline:
        return self.timelines.setdefault(name, Timeline(name, first))

    async def ask(self, method: str, path: str, body: Any = None, *, at: str | None = None, key: str = OWNER,
                  **asked: Any) -> Answer:
        """Ask one replica, the next one unless it is said which."""
        return await self.asks[at or self.next()].ask(method, path, key, body, **asked)

    async def done(self, method: str, path: str, body: Any = None, **fields: Any) -> Any:
        answer = await self.ask(method, path, body, **fields)
        assert answer.done, f"{answer}: {answer.body}"
        return answer.body

    async def change(self, name: str, value: Any, method: str, path: str, body: Any = None, *, at: str | None = None
                     ) -> Answer:
        """Change what a timeline tells of."""
        change = self.timelines[name].send(value, now())
        answer = await self.ask(method, path, body, at=at, timeline=name, value=str(value))
        answered(change, answer)
        return answer

    async def settled(self, since: float) -> None:
        """Until every replica has answered something that began when all that was acknowledged by then has to act."""
        await self.log.until(
            lambda: {answer.replica for answer in self.log.since(since + GRACE_S) if answer.done} >= set(self.serving),
            f"{self.serving} answered after a second")


def answered(change: Change, answer: Answer) -> None:
    if answer.done:
        change.acknowledged = answer.ended
    elif 400 <= answer.status < 500:
        change.refused = True


def numbers(seed: int, size: float = 1.0) -> list[float]:
    drawn = random.Random(seed)
    return [round(drawn.gauss(0, size), 4) for _ in range(WIDTH)]


def artifact(name: str, vector: Sequence[float]) -> dict[str, Any]:
    return {"metadata": {"name": name, "kind": "vector", "op": "add", "site": "resid_post"},
            "tensors": {LAYER: {"vector": list(vector)}}}


async def furnish(stage: Stage) -> None:
    """Artifacts, presets, keys and policies, before there is any load."""
    put, change = stage.done, stage.change
    for name, size in (("calm", 0.3), ("tone", 0.3), ("must", 0.3), ("soft", 0.1), ("turn", 0.1)):
        await put("POST", "/v1/artifacts", artifact(name, numbers(1, size)))
    for name, size in (("calm", 0.3), ("tone", 0.3), ("must", 0.3), ("turn", 60.0)):
        await put("POST", "/v1/artifacts", artifact(name, numbers(2, size)))
    for name in ("calm", "turn"):
        stage.timeline(name, 2)
        await change(name, 1, "PUT", f"/v1/artifacts/{name}/aliases/production", {"version": 1})
    for ref in ("soft@1", "turn@production"):
        await put("POST", "/v1/presets", {"name": "mood", "spec": {"interventions": [{"artifact": ref}]}})
    await put("PUT", "/v1/presets/mood/aliases/production", {"version": 1})
    stage.timeline("switch", False)
    stage.timeline("default", NONE)
    stage.timeline("policy", FREE)
    stage.timeline("mood", None)
    for tenant, roles in TENANTS.items():
        await new_key(stage, tenant, "main", roles)
    await put("PUT", "/v1/admin/policies/small", {"quota": {"requests_per_minute": A_MINUTE,
                                                            "parallel_requests": AT_ONCE}})


async def new_key(stage: Stage, tenant: str, name: str, roles: Sequence[str]) -> str:
    """Its label. Its name in the log is the label too."""
    label = f"{tenant}/{name}"
    stage.timeline(f"key {label}", ABSENT)
    answer = await stage.change(f"key {label}", OPEN, "POST", "/v1/admin/keys",
                                {"name": name, "tenant": tenant, "roles": list(roles)})
    if answer.done:
        stage.keys[label], stage.ids[label] = answer.body["key"], answer.body["id"]
        stage.log.names[answer.body["key"]] = label
    return label


async def replicas_say(stage: Stage, condition: Callable[[Answer], bool], path: str, what: str) -> None:
    """Until every replica that serves says so."""
    for name in stage.serving:
        async with asyncio.timeout(300):
            while not condition(answer := await stage.ask("GET", path, at=name)):
                await asyncio.sleep(0.1)
        assert condition(answer), what
