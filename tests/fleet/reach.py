"""How soon a change on one replica acts on the two others. `python -m tests.fleet.reach` prints the table of
docs/replicas.md.

Both others are asked again and again, one request after the other. Counted is the time from the acknowledgement of the
change to the end of the first answer that follows it, so each number has the time of an answer in it.
"""

import asyncio
import itertools
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tests.fleet.cluster import Fleet, running
from tests.fleet.heartbeat import Heartbeat
from tests.fleet.load import CHAT, Answer, Asker, Log, chat, now
from tests.fleet.stage import FORBIDDEN, FREE, POLICIES, Stage, furnish, new_key

HERE, THERE = "a", ("b", "c")
TIMES = 40
CALM = chat(tokens=1, steering={"interventions": [{"artifact": "calm"}]})
# A change to a value, as a request; what an answer says of it; and what is asked to find out, by whose key.
Change = Callable[[Any], Awaitable[Answer]]
Kind = tuple[str, tuple[Any, Any], Change, Callable[[Answer], Any], dict[str, Any], str]


def kinds(stage: Stage) -> Iterator[Kind]:
    def put(path: str, body: Callable[[Any], Any]) -> Change:
        return lambda value: stage.ask("PUT", path, body(value), at=HERE)

    def applied(source: str, answer: Answer) -> str:
        return ",".join(one["artifact"] for one in (answer.steering or {}).get("applied", [])
                        if one["source"] == source)

    yield ("an alias is moved", ("calm@2", "calm@1"),
           put("/v1/artifacts/calm/aliases/production", lambda ref: {"version": int(ref[-1])}),
           lambda answer: applied("request", answer), CALM, "green/main")
    key = f"/v1/admin/keys/{stage.ids['passing/k']}"
    yield ("a key is blocked, or taken again", (401, 200),
           lambda status: stage.ask("PATCH", key, {"blocked": status == 401}, at=HERE),
           lambda answer: answer.status, chat(tokens=1), "passing/k")
    yield ("a policy forbids an artifact, or allows it", (403, 200),
           put("/v1/admin/policies/blue", lambda status: POLICIES[FORBIDDEN if status == 403 else FREE]),
           lambda answer: answer.status, CALM, "blue/main")
    yield ("the kill switch is turned", (True, False), put("/v1/admin/kill-switch", lambda on: {"on": on}),
           lambda answer: answer.steering and answer.steering["disabled"], CALM, "green/main")
    yield ("the default spec is set", ("tone@1", "tone@2"),
           put("/v1/admin/default-spec", lambda ref: {"interventions": [{"artifact": ref}]}),
           lambda answer: applied("default", answer), chat(tokens=1), "green/main")

    async def rollout(ref: str) -> Answer:
        if ref == "mood@2":
            made = await stage.done("POST", "/v1/admin/rollouts", {"target": "mood", "candidate": 2,
                                                                   "steps": [{"share": 1.0}]}, at=HERE)
            stage.rollout = made["id"]
        path = f"/v1/admin/rollouts/{stage.rollout}"
        if ref == "mood@2":
            return await stage.ask("POST", f"{path}/publish", at=HERE)
        return await stage.ask("POST", f"{path}/return", {}, at=HERE)

    yield ("a roll-out is published, or returned", ("mood@2", "mood@1"), rollout,
           lambda answer: answer.steering and answer.steering["presets"].get("preset"),
           chat(tokens=1, steering={"preset": "mood"}), "green/main")


async def measure(stage: Stage, kind: Kind) -> list[float]:
    """Seconds, of each change and each of the others."""
    _, values, change, said, body, key = kind
    found = []
    for value in itertools.islice(itertools.cycle(values), TIMES):
        async def follows(name: str, value: Any = value) -> float:
            while True:
                answer = await stage.ask("POST", CHAT, body, at=name, key=stage.keys[key])
                if said(answer) == value:
                    return answer.ended

        watching = [asyncio.create_task(follows(name)) for name in THERE]
        done = await change(value)
        assert done.done, f"{done}: {done.body}"
        found += [max(await one - done.ended, 0.0) for one in watching]
    return found


async def play(fleet: Fleet) -> dict[str, list[float]]:
    log = Log()
    async with AsyncExitStack() as stack:
        asks = {name: Asker(replica.url, log, name) for name, replica in fleet.replicas.items()}
        for asker in asks.values():
            stack.push_async_callback(asker.close)
        stage = Stage(fleet, log, Heartbeat(), asks, asks[HERE])
        await furnish(stage)
        await new_key(stage, "passing", "k", ["infer"])
        await stage_ready(stage)
        return {kind[0]: await measure(stage, kind) for kind in kinds(stage)}


async def stage_ready(stage: Stage) -> None:
    """Every replica knows the keys, and has read both versions of what is asked for."""
    began = now()
    for name, label in itertools.product(THERE, ("green/main", "blue/main", "passing/k")):
        while not (await stage.ask("POST", CHAT, CALM, at=name, key=stage.keys[label])).done:
            assert now() - began < 60


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as fleet:
        found = asyncio.run(play(fleet))
    print("| on one server | on another, median | worst |\n|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {1e3 * statistics.median(seconds):.0f} ms | {1e3 * max(seconds):.0f} ms |")
    print(f"\n{TIMES} changes of each kind, two other replicas")


if __name__ == "__main__":
    main()
