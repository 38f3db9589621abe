"""The mixed tenants: what each of them asks the balancer, again and again."""

from collections.abc import Awaitable, Callable
from typing import Any

from tests.fleet.load import CHAT, MODEL, RESPONSES, Answer, chat
from tests.fleet.stage import Made, Stage, artifact, numbers

USERS = 60
LONG = 160


def clients(stage: Stage) -> list[tuple[Callable[[int], Awaitable[Any]], float]]:
    front, keys = stage.front, stage.keys

    async def blue(n: int) -> None:
        """Names an alias every other time; a policy may forbid that, or add to it."""
        steering = {"interventions": [{"artifact": "calm"}]} if n % 2 else None
        await front.ask("POST", CHAT, keys["blue/main"], chat(stream=n % 3 == 0, steering=steering),
                        tenant="blue", calm=bool(n % 2))

    async def green(n: int) -> None:
        """One of many users, of whom a roll-out gives some the candidate."""
        user = f"u{n * 7 % USERS}"
        await front.ask("POST", CHAT, keys["green/main"], chat(user, stream=n % 4 == 0, steering={"preset": "mood"}),
                        tenant="green", user=user, mood=True)

    async def passing(n: int) -> None:
        """Keys that come and go, those that are gone included."""
        if stage.passing:
            label = stage.passing[-1 - n % min(len(stage.passing), 4)]
            await front.ask("POST", CHAT, keys[label], chat(tokens=2), tenant="passing")

    async def small(n: int) -> None:
        """Asks for more than its quota."""
        streams = n % 3 == 0
        await front.ask("POST", CHAT, keys["small/main"], chat(tokens=24 if streams else 1, stream=streams),
                        tenant="small")

    async def long(n: int) -> None:
        """Always has a stream open."""
        await front.ask("POST", CHAT, keys["green/main"], chat(tokens=LONG, stream=True), tenant="green", long=True)

    last: dict[str, str] = {}

    async def talker(n: int) -> None:
        """Goes on with what it was answered last, by whatever replica, and begins anew now and then."""
        body = {"model": MODEL, "input": "Tell me more.", "max_output_tokens": 4}
        answer = await front.ask("POST", RESPONSES, keys["green/main"], body | last, tenant="green")
        if answer.done:
            last.clear()
            # That it could not be stored is said in the answer.
            if n % 5 and answer.body["store"]:
                last["previous_response_id"] = answer.body["id"]

    async def maker(n: int) -> None:
        """Stores an artifact, and where that fails the same again."""
        vector = numbers(1000 + n)
        for _ in range(100):
            answer = await front.ask("POST", "/v1/artifacts", keys["maker/main"], artifact(f"maker/n{n}", vector))
            if answer.done:
                stage.made.append(Made(answer.body["ref"], answer.body["digest"], vector))
                return

    return [(blue, 0.05), (blue, 0.07), (green, 0.03), (green, 0.05), (green, 0.07), (passing, 0.15), (small, 0.2),
            (small, 0.2), (small, 0.2), (long, 0.05), (long, 0.05), (maker, 1.0),
            (talker, 0.2)]


def open_streams(stage: Stage, replica: str) -> list[Answer]:
    """Of the long ones."""
    return [answer for answer in stage.log.open.values()
            if answer.replica == replica and answer.asked.get("long") and answer.status == 200]
