"""What an answer says of what was in force for it: of each timeline, the values that it may have followed."""

import hashlib
from collections.abc import Iterator
from typing import Any

from tests.fleet.load import Answer
from tests.fleet.stage import ABSENT, BLOCKED, FORBIDDEN, FREE, NONE, OPEN, Stage

Fact = tuple[str, set[Any]]


def facts(answer: Answer, stage: Stage) -> Iterator[Fact]:
    if not answer.status or not answer.replica:
        return
    key = f"key {answer.key}"
    if key in stage.timelines:
        yield key, {ABSENT, BLOCKED} if answer.status == 401 else {OPEN}
    if answer.status == 403 and answer.code == "policy_violation":
        yield "policy", {FORBIDDEN}
    if answer.steering is not None:
        yield "switch", {bool(answer.steering["disabled"])}
        if not answer.steering["disabled"]:
            yield from _steered(answer, answer.steering, stage)


def _steered(answer: Answer, receipt: dict[str, Any], stage: Stage) -> Iterator[Fact]:
    by: dict[str, list[str]] = {}
    for one in receipt["applied"]:
        by.setdefault(one["source"], []).append(one["artifact"])
    yield "default", set(by.get("default", [NONE]))
    if answer.asked.get("tenant") == "blue":
        # What is forbidden is refused, so whoever asks for it and gets it was not forbidden it.
        yield "policy", set(by["policy"]) if "policy" in by else {FREE} if answer.asked["calm"] else {FREE, FORBIDDEN}
    for ref in (ref for source in ("request", "preset") for ref in by.get(source, [])):
        name, _, version = ref.partition("@")
        if name in stage.timelines:
            yield name, {int(version)}
    if answer.asked.get("mood"):
        yield "mood", set(_arms(answer, receipt, stage))


def _arms(answer: Answer, receipt: dict[str, Any], stage: Stage) -> Iterator[float | None]:
    """The shares of the candidate, None for no roll-out, under which a user is given this version."""
    ref = receipt["presets"].get("preset")
    for share in {None, *(change.value for change in stage.timelines["mood"].changes)}:
        if share is None:
            if not receipt["rollouts"] and ref == "mood@1":
                yield None
            continue
        arm, version = ("candidate", "mood@2") if place(stage.rollout, "green", answer.asked["user"]) < share else (
            "stable", "mood@1")
        if [(one["rollout"], one["arm"], one["ref"]) for one in receipt["rollouts"]] == [
                (stage.rollout, arm, version)] and ref == version:
            yield share


def place(rollout: str, tenant: str, user: str) -> float:
    """Where docs/rollouts.md says that a user stands, from 0 to 1."""
    digest = hashlib.sha256(f"{rollout}\n{tenant}\nuser:{user}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
