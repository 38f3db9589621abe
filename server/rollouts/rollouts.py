"""The roll-outs at work, in memory, so that no request waits for a database; the library holds them for all servers.

What another server changes is known here within `POLL_S`; what is changed here acts before it is answered. A guard rail
that breaks ends its roll-out here at once, and for the others as soon as the library takes it.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

import anyio
import structlog
from pydantic import ValidationError

from server.observability.instruments import Counter, Gauge, Registry
from server.rollouts.arms import Arm, ArmName, Asking, place_of
from server.rollouts.tally import RailState, Tallies, broken
from server.rollouts.terms import Step, Terms
from server.threads import in_thread
from steering.language.errors import TrimtabError
from vectors.library import rollouts as stored
from vectors.library.naming import DEFAULT_ALIAS
from vectors.library.rollouts import ITSELF, StoredRollout, Tally
from vectors.library.spaces import READER
from vectors.storage_errors import LibraryUnavailable

log = structlog.get_logger("trimtab.rollouts")
Result = TypeVar("Result")
POLL_S = 0.5
STOP_S = 5.0


@dataclass
class Running:
    """A roll-out that is at work. ended: why it is to be returned, where this server knows and the library does not.
    problem: why it cannot go on by itself."""

    stored: StoredRollout
    terms: Terms
    tallies: Tallies
    ended: str | None = None
    problem: str | None = None

    @property
    def step(self) -> Step:
        return self.terms.steps[min(self.stored.step, len(self.terms.steps) - 1)]

    def arm(self, asking: Asking) -> ArmName:
        given = asking.key_id is not None and asking.key_id in self.terms.keys
        return "candidate" if given or place_of(self.stored.id, asking.unit) < self.step.share else "stable"

    def as_arm(self, arm: ArmName) -> Arm:
        refs = {"stable": f"{self.stored.name}@{self.stored.stable}",
                "candidate": f"{self.stored.name}@{self.stored.candidate}"}
        other: ArmName = "candidate" if arm == "stable" else "stable"
        return Arm(self.stored.id, self.stored.target, arm, refs[arm], refs[other])


@dataclass
class Arms:
    """The arms of one request, chosen as it names what is rolled out. forced: a roll-out whose arm is the candidate's.
    """

    rollouts: "Rollouts"
    asking: Asking
    forced: str | None = None
    taken: dict[str, Arm] = field(default_factory=dict)

    def ref(self, collection: str, ref: str, allowed: Callable[[str], bool]) -> str:
        """The version that `ref` means to who asks. allowed: whether a policy lets them have the candidate; where it
        does not, they stay with the stable version."""
        running = self.rollouts.behind(collection, ref)
        if running is None or not READER.get().reads(running.stored.name):
            return ref
        id = running.stored.id
        arm = self.taken.get(id)
        if arm is None:
            name: ArmName = "candidate" if self.forced == id else running.arm(self.asking)
            arm = running.as_arm(name)
            if name == "candidate" and not allowed(arm.ref):
                arm = running.as_arm("stable")
            self.taken[id] = arm
        return arm.ref


class Rollouts:
    """`behind` may be called from any thread; the rest belongs to the event loop."""

    def __init__(self, library: stored.Rollouts, registry: Registry, *,
                 now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._library, self._now = library, now
        self._running: dict[str, Running] = {}
        self._behind: dict[tuple[str, str, str], Running] = {}
        self._wake, self._reading = asyncio.Event(), asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.failure: str | None = None
        self._requests = Counter("trimtab_rollout_requests", "Requests that name what is rolled out, by their arm.",
                                 ["rollout", "target", "arm"], registry=registry)
        self._samples = Counter("trimtab_rollout_samples", "Samples of guard rails.", ["rollout", "rail", "arm"],
                                registry=registry)
        self._evidence = Gauge("trimtab_rollout_evidence", "Evidence against the candidate, over what ends the "
                               "roll-out at 1.", ["rollout", "rail"], registry=registry)
        self._least = Gauge("trimtab_rollout_least_samples", "Samples of a guard rail, of the arm that has fewer, on "
                            "all servers.", ["rollout", "rail"], registry=registry)
        self._share = Gauge("trimtab_rollout_share", "Share of users that get the candidate.", ["rollout", "target"],
                            registry=registry)
        self._returned = Counter("trimtab_rollout_returns", "Roll-outs that a guard rail ended on this server.",
                                 registry=registry)
        Gauge("trimtab_rollouts_out_of_step", "1 while roll-outs cannot be read from the library or stored there.",
              registry=registry).set_function(lambda: float(self.failure is not None))

    async def start(self) -> None:
        """Read the roll-outs, then follow them. Raises LibraryUnavailable."""
        await self.refresh()
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            try:
                async with asyncio.timeout(STOP_S):
                    await self._store()
            except Exception as error:  # the samples of the last half second are not worth a stop that fails
                log.warning("rollout_samples_not_stored", error=str(error)[:300])

    def wake(self) -> None:
        """Look now for what other servers changed."""
        self._wake.set()

    def arms(self, asking: Asking, *, forced: str | None = None) -> Arms:
        return Arms(self, asking, forced)

    def behind(self, collection: str, ref: str) -> Running | None:
        """The roll-out that is at work behind a reference. A bare name means its alias `production`."""
        name, _, selector = ref.partition("@")
        found = self._behind.get((collection, name, selector or DEFAULT_ALIAS))
        return None if found is None or found.ended is not None else found

    def running(self, id: str) -> Running | None:
        return self._running.get(id)

    def counted(self, arm: Arm) -> None:
        self._requests.labels(arm.rollout, arm.target, arm.arm).inc()

    def sample(self, id: str, arm: ArmName, values: Mapping[int, float]) -> None:
        """Of an answer that was given to somebody: values by the number of the rail."""
        running = self._running.get(id)
        if running is None:
            return
        for rail, value in values.items():
            running.tallies.add(arm, rail, value)
            self._samples.labels(id, running.terms.rails[rail].label, arm).inc()

    def pair(self, id: str, values: Mapping[int, tuple[float, float]]) -> None:
        """What the stable version and the candidate made of one prompt, by the number of the rail."""
        running = self._running.get(id)
        if running is None:
            return
        for rail, (stable, candidate) in values.items():
            running.tallies.pair(rail, stable, candidate)
            for arm in ("stable", "candidate"):
                self._samples.labels(id, running.terms.rails[rail].label, arm).inc()

    async def changed(self, work: Callable[[], Result]) -> Result:
        """Do `work` on the library, and have it act here before this returns."""
        result = await in_thread(work)
        await self.refresh()
        return result

    async def states(self, found: Sequence[StoredRollout]) -> list[list[RailState]]:
        """What the rails of roll-outs say, of those at work and of others. Raises LibraryUnavailable."""
        known = {one.id: self._running[one.id].tallies for one in found if one.id in self._running}
        others = [one for one in found if one.id not in known]
        stored = await in_thread(self._library.tallies, [one.id for one in others]) if others else {}
        for one in others:
            known[one.id] = Tallies(terms_of(one))
            known[one.id].stored = stored.get(one.id, {})
        return [known[one.id].states() for one in found]

    async def refresh(self) -> None:
        """Raises LibraryUnavailable."""
        # One at a time, so that what was read first never takes the place of what was read after it.
        async with self._reading:
            found = await in_thread(self._library.running)
            new = [one.id for one in found if one.id not in self._running]
            self._take(found, await in_thread(self._library.tallies, new) if new else {})

    def _take(self, found: Sequence[StoredRollout], tallies: Mapping[str, dict[int, Tally]]) -> None:
        """Have these at work, and no others. tallies: of those that are new."""
        kept = {}
        for one in found:
            running = self._running.get(one.id)
            if running is None:
                try:
                    terms = terms_of(one)
                except LibraryUnavailable as error:
                    # Only its stable version acts here, and the other roll-outs go on.
                    log.error("rollout_unreadable", rollout=one.id, error=error.message)
                    continue
                running = Running(one, terms, Tallies(terms))
                running.tallies.stored = tallies.get(one.id, {})
            running.stored = one
            kept[one.id] = running
        for gone in self._running.keys() - kept.keys():
            self._forget(self._running[gone])
        self._running = kept
        self._behind = {(it.stored.collection, it.stored.name, it.stored.alias): it for it in kept.values()}
        for it in kept.values():
            self._share.labels(it.stored.id, it.stored.target).set(it.step.share)

    async def look(self) -> None:
        """One look at everything: what ends is ended, what may go on goes on. Whatever fails is tried again."""
        for running in self._running.values():
            self._judge(running)
        try:
            await self._store()
            await self.refresh()
            for running in list(self._running.values()):
                await self._go_on(running)
            self.failure = None
        except Exception as error:  # any error of a database: what is known goes on to count
            if self.failure is None:
                log.warning("rollouts_out_of_step", error=str(error)[:300])
            self.failure = f"{type(error).__name__}: {error}"[:300]

    async def _follow(self) -> None:
        while True:
            with anyio.move_on_after(POLL_S):
                await self._wake.wait()
            self._wake.clear()
            await self.look()

    def _judge(self, running: Running) -> None:
        states = running.tallies.states()
        for state in states:
            labels = running.stored.id, state.rail.label
            self._evidence.labels(*labels).set(state.evidence)
            self._least.labels(*labels).set(min(state.stable_count, state.candidate_count))
        why = broken(states)
        if why is not None and running.ended is None:
            running.ended = why
            self._returned.inc()
            log.warning("rollout_returned", rollout=running.stored.id, target=running.stored.target, why=why)

    async def _store(self) -> None:
        """Tell the library what was seen, and learn what all servers have seen."""
        taken = {id: found for id, one in self._running.items() if (found := one.tallies.take())}
        seen: dict[tuple[str, int], Tally] = {(id, rail): tally for id, found in taken.items()
                                              for rail, tally in found.items()}
        try:
            if seen:
                await in_thread(self._library.add, seen)
        except BaseException:
            for id, found in taken.items():
                if id in self._running:
                    self._running[id].tallies.give_back(found)
            raise
        ids = list(self._running)
        known = await in_thread(self._library.tallies, ids) if ids else {}
        for id in ids:
            if id in self._running:
                self._running[id].tallies.stored = known.get(id, {})

    async def _go_on(self, running: Running) -> None:
        self._judge(running)
        id, step = running.stored.id, running.stored.step
        if running.ended is not None:
            why = running.ended
            await self.changed(lambda: self._library.give_back(id, why, actor=ITSELF))
            return
        lasted = (self._now() - running.stored.step_since).total_seconds()
        if lasted < running.step.wait_s or not running.tallies.has_samples(min(step, len(running.terms.steps) - 1)):
            return
        if step + 1 < len(running.terms.steps):
            await self.changed(lambda: self._library.advance(id, step))
            log.info("rollout_step", rollout=id, step=step + 1)
        elif running.terms.then == "promote":
            try:
                await self.changed(lambda: self._library.promote(id, actor=ITSELF))
                log.info("rollout_promoted", rollout=id)
            except LibraryUnavailable:
                raise
            except TrimtabError as error:
                running.problem = error.message

    def _forget(self, gone: Running) -> None:
        """Its names in metrics go with it, because roll-outs come without end."""
        id, target = gone.stored.id, gone.stored.target
        arms = ("stable", "candidate")
        pairs: list[tuple[Counter | Gauge, tuple[str, ...]]] = [
            (self._share, (id, target)), *((self._requests, (id, target, arm)) for arm in arms)]
        for rail in gone.terms.rails:
            pairs += [(self._evidence, (id, rail.label)), (self._least, (id, rail.label)),
                      *((self._samples, (id, rail.label, arm)) for arm in arms)]
        for instrument, labels in pairs:
            with suppress(KeyError):
                instrument.remove(*labels)


def terms_of(found: StoredRollout) -> Terms:
    """Raises LibraryUnavailable: a newer version of the server wrote it."""
    try:
        return Terms.model_validate_json(found.terms)
    except ValidationError as error:
        raise LibraryUnavailable(f"the terms of the roll-out {found.id} cannot be read",
                                 fix="Return it, or use the version that wrote it.") from error
