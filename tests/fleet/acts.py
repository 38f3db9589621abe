"""What happens to the fleet while it is under load, one act after the other."""

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

from tests.fleet.clients import open_streams
from tests.fleet.load import CHAT, chat, now
from tests.fleet.stage import (
    BLOCKED,
    FREE,
    NONE,
    OPEN,
    POLICIES,
    Stage,
    answered,
    new_key,
    replicas_say,
)

SWITCH = "/v1/admin/kill-switch"
EXIT_S = 300
# At the end both arms are about as large, which is when a guard rail is sharpest.
STEPS = (0.2, 0.4, 0.6)
TERMS = {"steps": [{"share": share, "wait_s": 1.0} for share in STEPS[:-1]] + [{"share": STEPS[-1], "wait_s": 3600.0}],
         "rails": [{"metric": "dose", "margin": 0.2, "scale": 2.0, "samples": 5},
                   {"metric": "errors", "margin": 0.0, "samples": 5}], "sample": 1.0}
PAIRS = [{"positive": f"The {noun} was wonderful.", "negative": f"The {noun} was terrible.", "item": noun}
         for noun in ("day", "room", "food", "view", "staff", "bed", "pool", "bar", "town", "walk")]


async def changes(stage: Stage, rounds: int) -> None:
    """Aliases move, policies and the default spec change, keys come and go, the kill switch is turned."""
    versions, policies = itertools.cycle((2, 1)), itertools.cycle(("must@1", "forbidden", "must@2", FREE))
    defaults = itertools.cycle(("tone@1", NONE, "tone@2"))
    for n in range(rounds):
        await asyncio.gather(_alias(stage, "calm", next(versions)), _policy(stage, next(policies)),
                             _default(stage, next(defaults)), _keys(stage))
        await stage.settled(now())
        if n % 2:
            for on in (True, False):
                answer = await stage.change("switch", on, "PUT", SWITCH, {"on": on})
                assert answer.done and answer.body["stored"], f"{answer}: {answer.body}"
                await stage.settled(now())


async def _alias(stage: Stage, name: str, version: int, at: str | None = None) -> None:
    answer = await stage.change(name, version, "PUT", f"/v1/artifacts/{name}/aliases/production", {"version": version},
                                at=at)
    assert answer.done, f"{answer}: {answer.body}"


async def _policy(stage: Stage, value: str, at: str | None = None) -> None:
    answer = await stage.change("policy", value, "PUT", "/v1/admin/policies/blue", POLICIES[value], at=at)
    assert answer.done, f"{answer}: {answer.body}"


async def _default(stage: Stage, value: str) -> None:
    body = None if value == NONE else {"interventions": [{"artifact": value}]}
    answer = await stage.change("default", value, "DELETE" if body is None else "PUT", "/v1/admin/default-spec", body)
    assert answer.done, f"{answer}: {answer.body}"


async def _keys(stage: Stage) -> None:
    """Make one, block the one before, and take the one before that again."""
    label = await new_key(stage, "passing", f"k{len(stage.passing)}", ["infer"])
    stage.passing.append(label)
    for before, value, body in ((2, BLOCKED, {"blocked": True}), (3, OPEN, {"blocked": False})):
        if len(stage.passing) >= before:
            other = stage.passing[-before]
            answer = await stage.change(f"key {other}", value, "PATCH", f"/v1/admin/keys/{stage.ids[other]}", body)
            assert answer.done, f"{answer}: {answer.body}"


async def job(stage: Stage, at: str) -> str:
    """Its id."""
    name = f"maker/pulled{len(stage.jobs)}"
    answer = await stage.ask("POST", "/v1/extract", {"name": name, "layers": [1, 2, 3], "pairs": PAIRS},
                             at=at, key=stage.keys["maker/main"])
    assert answer.done, f"{answer}: {answer.body}"
    id: str = answer.body["id"]
    stage.jobs[id] = name
    return id


class Ramp:
    """A roll-out, watched until it has ended."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._worse_at = float("inf")
        self._task: asyncio.Task[None] | None = None

    @property
    def _line(self) -> Any:
        return self._stage.timelines["mood"]

    async def begin(self) -> None:
        stage = self._stage
        made = await stage.done("POST", "/v1/admin/rollouts", {"target": "mood", "candidate": 2, **TERMS})
        stage.rollout = made["id"]
        answer = await stage.change("mood", STEPS[0], "POST", f"/v1/admin/rollouts/{stage.rollout}/publish")
        assert answer.done, f"{answer}: {answer.body}"
        self._task = asyncio.create_task(self._watch())

    async def reached(self, share: float | None) -> None:
        await self._stage.log.until(lambda: self._line.last == share, f"the roll-out is at {share}")

    async def make_worse(self) -> None:
        """The candidate names an alias, which from now on means something that drives the model out of its mind."""
        self._worse_at = now()
        await _alias(self._stage, "turn", 2)

    async def ended(self) -> None:
        await self.reached(None)
        assert self._task is not None
        await self._task
        await self._stage.settled(now())

    async def _watch(self) -> None:
        """What it is at is known from the looks before and after. The replica that finds the regression ends it for
        itself before anybody can see that."""
        before = now()
        while True:
            began = now()
            answer = await self._stage.ask("GET", f"/v1/admin/rollouts/{self._stage.rollout}")
            if answer.done:
                at = STEPS[answer.body["step"]] if answer.body["status"] == "published" else None
                if at != self._line.last:
                    change = self._line.send(at, self._worse_at if at is None else before)
                    answered(change, answer)
                if at is None:
                    return
                before = began
            await asyncio.sleep(0.1)


async def kill(stage: Stage, name: str, heir: str) -> None:
    """Without a word, while it answers and does a job; another one takes its place."""
    ids = [await job(stage, name) for _ in range(2)]
    async with asyncio.timeout(300):
        while (await stage.done("GET", f"/v1/jobs/{ids[0]}", at=name))["status"] == "queued":
            await asyncio.sleep(0.02)
    await stage.log.until(lambda: bool(open_streams(stage, name)), f"{name} has a stream open")
    stage.serving.remove(name)
    # What it has just acknowledged it cannot tell anybody any more.
    await asyncio.gather(_alias(stage, "calm", 2, at=name), _policy(stage, "must@1", at=name))
    stage.ends[name] = now()
    stage.fleet.replicas[name].kill()
    await stage.settled(now())
    await replace(stage, heir)


async def replace(stage: Stage, heir: str) -> None:
    await asyncio.to_thread(stage.fleet.start, [heir])
    stage.serving.append(heir)
    await stage.settled(now())


async def drain(stage: Stage, name: str, heir: str) -> None:
    """With streams open, and a job."""
    await job(stage, name)
    await stage.log.until(lambda: bool(open_streams(stage, name)), f"{name} has a stream open")
    stage.serving.remove(name)
    stage.ends[name] = now()
    replica = stage.fleet.replicas[name]
    replica.tell_to_stop()
    assert replica.process is not None
    assert await asyncio.to_thread(replica.process.wait, EXIT_S) == 0
    await replace(stage, heir)


async def restart_database(stage: Stage) -> None:
    """While it is away the kill switch is turned on one replica, where it acts; the others follow afterwards."""
    # These are acknowledged when it goes, so that nobody may have been told of them.
    await asyncio.gather(_alias(stage, "calm", 1), _policy(stage, FREE), _keys(stage))
    down = now()
    stage.outages.append((down, float("inf")))
    await asyncio.to_thread(stage.fleet.database.stop)
    gone = now()
    await stage.log.until(
        lambda: {answer.replica for answer in stage.log.since(gone) if answer.code == "library_unavailable"} >= set(
            stage.serving), "every replica misses the database")
    here = stage.next()
    change = stage.timelines["switch"].send(True, now())
    answer = await stage.ask("PUT", SWITCH, {"on": True}, at=here)
    assert answer.done and answer.body["on"] and not answer.body["stored"], f"{answer}: {answer.body}"
    for _ in range(3):
        asked = await stage.ask("POST", CHAT, chat(steering={"interventions": [{"artifact": "calm"}]}), at=here)
        assert asked.done and asked.steering is not None and asked.steering["disabled"], f"{asked}: {asked.body}"
    refused = await stage.change("calm", 2, "PUT", "/v1/artifacts/calm/aliases/production", {"version": 2})
    assert (refused.status, refused.code) == (503, "library_unavailable"), f"{refused}: {refused.body}"
    await asyncio.to_thread(stage.fleet.database.start)
    stage.outages[-1] = down, now()
    await replicas_say(stage, lambda it: it.done and it.body["on"], SWITCH, "the switch is on everywhere")
    change.acknowledged = now()
    await stage.settled(now())
    turned = await stage.change("switch", False, "PUT", SWITCH, {"on": False})
    assert turned.done and turned.body["stored"], f"{turned}: {turned.body}"
    await stage.settled(now())


async def refuse_blobs(stage: Stage) -> None:
    """S3 answers 503 to everything for a while, while artifacts are stored."""
    s3, many = stage.fleet.s3, 10**9
    methods = ("PUT", "GET", "HEAD", "POST")
    stored = len(stage.made)
    s3.refuses.update(dict.fromkeys(methods, many))
    await stage.log.until(lambda: sum(many - s3.refuses[method] for method in methods) >= 5, "S3 has refused something")
    moved = now()
    await _alias(stage, "calm", 2)
    await stage.settled(moved)
    s3.refuses.clear()
    await stage.log.until(lambda: len(stage.made) > stored + 1, "artifacts are stored again")
    await _alias(stage, "calm", 1)
    await stage.settled(now())


def jobs_over(answer: Any, stage: Stage) -> Iterator[str]:
    """Of the jobs that were acknowledged, what is not over."""
    found = {one["id"]: one["status"] for one in answer.body["data"]} if answer.done else {}
    return (id for id in stage.jobs if found.get(id) not in ("succeeded", "failed", "cancelled"))


async def finish_jobs(stage: Stage) -> None:
    await replicas_say(stage, lambda answer: answer.done and not any(jobs_over(answer, stage)), "/v1/jobs",
                       "all jobs are over")
