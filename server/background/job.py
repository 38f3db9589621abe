"""One background job: its state as the API shows it, and the end of it that the job's own work holds."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, Field

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINISHED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
T = TypeVar("T")
# Of its own thread's time, what a job may use before that counts as a step.
UNCOUNTED_S = 0.02
# How often it is looked whether the next step may begin.
LOOK_S = 0.02


class Courtesy(Protocol):
    """What jobs give way by: `server.engines.guests.Share`."""

    def due(self) -> bool: ...

    def took(self, seconds: float, tokens: int) -> None: ...


class Behind(BaseModel):
    """The job before one that waits."""

    id: str
    kind: str
    about: str


class Job(BaseModel):
    """State of one job as the API shows it."""

    id: str
    kind: str = Field(description="What it does, extract say.")
    about: str = Field(default="", description="What it works on, the name of an artifact say.")
    status: Status = "queued"
    estimate_s: float | None = Field(default=None, description="Seconds it will take once it runs, from the speed of a "
                                     "small pass when it was submitted; null where nobody knows.")
    progress: float = Field(default=0.0, description="0 to 1.")
    stage: str = Field(default="", description="What it is doing.")
    place: int | None = Field(default=None, description="In the queue: 0 has its turn, 1 is next. Null for a job that "
                              "is over, or that another server runs.")
    behind: Behind | None = Field(default=None, description="The job before it in the queue, if it is of the same "
                                  "tenant.")
    owner: str = Field(default="", description="The server process that runs it.")
    tenant: str = Field(default="default", description="Whose it is.")
    created_at: float = Field(description="Unix time.")
    started_at: float | None = None
    finished_at: float | None = None
    result: dict[str, Any] | None = Field(default=None, description="Of a job that succeeded.")
    error: dict[str, Any] | None = Field(default=None, description="Of a job that failed, in the shape of errors.")


class Cancelled(Exception):
    """Raised by work that noticed it should stop."""


class Control:
    """A job's own end of its state. Safe to use from a worker thread, but for what is said to belong to the event
    loop.

    What the job computes itself, between two passes of the engine, gives way to requests as these passes do: it takes
    the interpreter from the threads that serve. So the time that its thread has used counts as a step, after which
    `progress` and `result` wait for the next one.

    Args:
        share: of the guests; None where nobody is to be given way to.
        used: seconds that the calling thread has had of the processor.
    """

    def __init__(self, job: Job, share: Courtesy | None = None, used: Callable[[], float] = time.thread_time) -> None:
        self._job = job
        self._share, self._used = share, used
        self._counted: float | None = None
        self._cancelled = False
        self._until = float("inf")
        self._go = asyncio.Event()
        self._lock = threading.Lock()
        self._waits_for: Future[Any] | None = None

    def progress(self, fraction: float, stage: str) -> None:
        """Progress never goes back, whatever a stage makes of its share. Raises Cancelled."""
        self._give_way()
        self.check()
        self._job.progress = max(self._job.progress, min(max(fraction, 0.0), 1.0))
        self._job.stage = stage

    @property
    def job_id(self) -> str:
        return self._job.id

    def cancelled(self) -> bool:
        return self._cancelled

    def check(self) -> None:
        """Raises Cancelled: the work is no longer wanted, or another server may have begun it anew by now. It is asked
        last before a result is stored."""
        if self._cancelled or self.expired:
            raise Cancelled

    @property
    def expired(self) -> bool:
        """Whether the job may be another server's by now."""
        return time.monotonic() > self._until

    def hold(self, until: float) -> None:
        """The job is this server's until then, by the monotonic clock."""
        self._until = until

    def result(self, work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
        """The result of a coroutine on the event loop, waited for in the job's thread. Raises Cancelled in the moment
        in which the job is, and begins nothing for one that is cancelled already."""
        self._give_way()
        with self._lock:
            if self._cancelled:
                work.close()
                raise Cancelled
            future = self._waits_for = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except CancelledError:
            self.check()
            raise
        finally:
            self._waits_for = None

    def _give_way(self) -> None:
        """Wait until the next step may begin, where the job's thread, which this is, has computed since the last one.
        """
        if self._share is None:
            return
        now = self._used()
        took = 0.0 if self._counted is None else now - self._counted
        if self._counted is None:
            self._counted = now
        if took < UNCOUNTED_S:
            return
        self._counted = now
        self._share.took(took, 0)
        while not self._cancelled and not self._share.due():
            time.sleep(LOOK_S)

    async def turn(self) -> None:
        """Wait while a shorter job has the turn; on the event loop, before every step."""
        await self._go.wait()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._waits_for is not None:
                self._waits_for.cancel()

    def go(self, turn: bool) -> None:
        """On the event loop."""
        if turn:
            self._go.set()
        else:
            self._go.clear()


Work = Callable[[Control], Awaitable[dict[str, Any]]]
