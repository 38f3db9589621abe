"""Who steered whom with what, of a share of the requests, for the audit.

Nobody waits for it: records are written behind the requests, a second's worth at a time. What cannot be written in time
is left out and counted.
"""

import asyncio
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from server.observability.instruments import Counter, Registry
from server.requests.plan import Plan, Planned
from server.settings import Settings
from server.threads import in_thread
from steering.programs.program import Program
from vectors.library.audit.log import AuditLog
from vectors.library.audit.notes import ACTOR, Actor, Note

log = structlog.get_logger("trimtab.audit")
EVERY_S = 1.0
MOST_WAITING = 2048
LONGEST_TOKENS = 1024
REDACTED = "[redacted]"


@dataclass(frozen=True)
class _Texts:
    model: str
    prompts: list[Sequence[int]]
    answers: list[Sequence[int]]
    actor: Actor
    at: datetime


class SteeringAudit:
    """`begun` and `ended` belong to the event loop and return at once."""

    def __init__(self, audit: AuditLog, registry: Registry, decode: Callable[[list[int]], str], settings: Settings
                 ) -> None:
        self._audit, self._decode = audit, decode
        self._set(settings)
        self._waiting: list[Note | _Texts] = []
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._dropped = Counter("trimtab_audit_dropped", "Records of steered requests that were left out because the "
                                "library took none.", registry=registry)

    async def start(self) -> None:
        self._work_if_needed()

    def follow(self, settings: Settings) -> None:
        """Record as these settings say, from now on."""
        self._set(settings)
        self._work_if_needed()

    def _set(self, settings: Settings) -> None:
        self._sample, self._texts = settings.audit_steering_sample, settings.audit_texts
        self._redact = [re.compile(pattern) for pattern in settings.audit_redact]

    def _work_if_needed(self) -> None:
        if self._sample and self._task is None:
            self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self.write()

    def begun(self, model: str, user: str | None, plan: Plan) -> bool:
        """Whether the request is one of the sample."""
        if not plan.steers or random.random() >= self._sample:
            return False
        weak = plan.contrast
        contrast = {} if weak is None else {"contrast": {
            "weak": _applied(weak.planned, weak.program), "alpha": weak.alpha, "beta": weak.beta}}
        self._offer(Note("steer", model, actor=ACTOR.get(), at=datetime.now(UTC), after={
            "user": user, "presets": dict(plan.presets or {}), "applied": _applied(plan.planned, plan.program),
            **contrast,
            **({"rollouts": [{"rollout": arm.rollout, "arm": arm.arm} for arm in plan.arms]} if plan.arms else {})}))
        return True

    def ended(self, model: str, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
        """What a request of the sample was asked and answered, for servers that are set to record it."""
        if self._texts:
            self._offer(_Texts(model, [one[-LONGEST_TOKENS:] for one in prompts],
                               [one[:LONGEST_TOKENS] for one in answers], ACTOR.get(), datetime.now(UTC)))

    def _offer(self, one: Note | _Texts) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self._dropped.inc()
        else:
            self._waiting.append(one)

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await self.write()

    async def write(self) -> None:
        """Write what waits, and return when what others began to write is there too. It fails no request: what cannot
        be written is counted and gone."""
        async with self._writing:
            taken, self._waiting = self._waiting, []
            if not taken:
                return
            try:
                await in_thread(lambda: self._audit.add_all([self._note(one) for one in taken]))
            except Exception as error:  # any error of a database
                self._dropped.inc(len(taken))
                log.warning("steering_not_recorded", records=len(taken), error=str(error)[:300])

    def _note(self, one: Note | _Texts) -> Note:
        if isinstance(one, Note):
            return one
        texts: dict[str, Any] = {"prompts": [self._told(ids) for ids in one.prompts],
                                 "answers": [self._told(ids) for ids in one.answers]}
        return Note("steer.text", one.model, after=texts, actor=one.actor, at=one.at)

    def _told(self, ids: Sequence[int]) -> str:
        text = self._decode(list(ids))
        for pattern in self._redact:
            text = pattern.sub(REDACTED, text)
        return text


def _applied(planned: Sequence[Planned], program: Program | None) -> list[dict[str, Any]]:
    return [{"artifact": compiled.applied.artifact or "inline", "op": compiled.applied.op,
             "layers": list(compiled.applied.layers), "strength": dict(compiled.applied.strength), "source": one.origin}
            for one, compiled in zip(planned, () if program is None else program.compiled, strict=True)]
