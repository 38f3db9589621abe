"""What the workers report about requests: how far interventions moved tokens, and why a request was ended."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.engines.data import Touched
from server.engines.vllm.host.connection import Connection
from server.engines.vllm.wire import Fault


@dataclass(frozen=True)
class StepSums:
    """The relative steps of one intervention: the largest, their sum and number, and how many were clipped."""

    largest: float
    total: float
    count: int
    clipped: int

    def joined(self, other: "StepSums") -> "StepSums":
        return StepSums(max(self.largest, other.largest), self.total + other.total, self.count + other.count,
                     self.clipped + other.clipped)


@dataclass(frozen=True)
class Taken:
    """Of one request; `steps` by intervention."""

    steps: dict[int, StepSums]
    fault: Fault | None = None

    def add_to(self, touched: list[Touched]) -> list[Touched]:
        """The counts with the steps beside them."""
        return [replace(item, largest_step=self.steps[j].largest, mean_step=self.steps[j].total / self.steps[j].count,
                        clipped=self.steps[j].clipped) if j in self.steps else item for j, item in enumerate(touched)]

    def strongest(self) -> int | None:
        """The intervention with the largest step."""
        return max(self.steps, key=lambda j: self.steps[j].largest, default=None)

    @classmethod
    def of(cls, answers: Sequence[dict[str, Any] | None]) -> "Taken":
        """From the ranks that have layers of their own."""
        steps: dict[int, StepSums] = {}
        fault = None
        for answer in answers:
            if answer is None:
                continue
            if fault is None and answer["fault"] is not None:
                fault = Fault(**answer["fault"])
            for j, *numbers in answer["steps"]:
                found = StepSums(*numbers)
                steps[j] = steps[j].joined(found) if j in steps else found
        return cls(steps, fault)


class Asking:
    """Asks the workers about requests, with one call for all that are asked about at the same time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._wanted: dict[str, asyncio.Future[Taken]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def taken(self, name: str) -> Taken:
        """
        Raises:
            EngineUnavailable: the engine does not run.
        """
        future = self._wanted[name] = asyncio.get_running_loop().create_future()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask())
        return await future

    async def _ask(self) -> None:
        while self._wanted:
            wanted, self._wanted = self._wanted, {}
            try:
                ranks = [answer for answer in await self._connection.rpc("trimtab_taken", list(wanted))
                         if answer is not None]
            except Exception as error:  # told to everybody who asked
                for future in wanted.values():
                    if not future.done():
                        future.set_exception(error)
                continue
            for n, future in enumerate(wanted.values()):
                if not future.done():
                    future.set_result(Taken.of([answers[n] for answers in ranks]))
