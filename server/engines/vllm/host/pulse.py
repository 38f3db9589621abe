"""Whether vLLM's processes make progress: when they were last heard of, whether work waits, and how to end them."""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil

# What vLLM calls the processes that it begins.
STARTED = ("EngineCore", "VLLM")


class Pulse:
    """When one replica of the model was last heard of, and how much work waits for it. It beats with every step of the
    replica's scheduler and with every answer to a call.

    Args:
        clock: seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending = 0
        self._since = clock()

    def beat(self) -> None:
        self._since = self._clock()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Something waits for the replica in the block."""
        if not self._pending:
            # Silence before there was anything to do is none.
            self.beat()
        self._pending += 1
        try:
            yield
        finally:
            self._pending -= 1

    @property
    def silent_s(self) -> float:
        """How long nothing was heard though work waits; 0 where none does."""
        return self._clock() - self._since if self._pending else 0.0


class Pulses:
    """One pulse for each replica, because a replica that hangs must not be hidden by one beside it that works.

    Args:
        clock: seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of = {0: Pulse(clock)}
        self._running: Counter[int] = Counter()

    def reset(self, replicas: Iterable[int]) -> None:
        """The replicas of an engine that has just been started."""
        self._of = {replica: Pulse(self._clock) for replica in replicas}

    def beat(self, replica: int | None = None) -> None:
        """None: all of them were heard of."""
        for number, pulse in self._of.items():
            if replica is None or number == replica:
                pulse.beat()

    @contextmanager
    def work(self, replica: int | None = None) -> Iterator[None]:
        """Something waits for a replica in the block; None: for all of them."""
        with ExitStack() as waiting:
            for number, pulse in self._of.items():
                if replica is None or number == replica:
                    waiting.enter_context(pulse.work())
            yield

    @contextmanager
    def request(self, replica: int | None = None) -> Iterator[int]:
        """The replica that a new request is to run on: the given one, or the one with the fewest requests. The request
        runs there as long as the block does."""
        chosen = min(self._of, key=lambda number: self._running[number]) if replica is None else replica
        self._running[chosen] += 1
        try:
            yield chosen
        finally:
            self._running[chosen] -= 1

    @property
    def first(self) -> int:
        """The replica that measures."""
        return min(self._of)

    @property
    def silent_s(self) -> float:
        """Silence of the replica that has been silent for longest though work waits for it."""
        return max(pulse.silent_s for pulse in self._of.values())

    def __len__(self) -> int:
        return len(self._of)


def beating(pulses: Pulses) -> Any:
    """A factory of vLLM's loggers of statistics, of which each replica has its own, told of each of its steps."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Beats(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._replica = engine_index

        def record(self, *args: Any, **kwargs: Any) -> None:
            pulses.beat(self._replica)

        def log_engine_initialized(self) -> None:
            pass

    return Beats


def end_starting() -> None:
    """End the processes of an engine that is still being started, and those that they began. Whoever waits for them
    in a thread then sees that they are gone."""
    for child in multiprocessing.active_children():
        if child.pid is not None and child.name.startswith(STARTED):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(child.pid)
                for one in (*process.children(recursive=True), process):
                    with suppress(psutil.NoSuchProcess):
                        one.kill()


class Processes:
    """vLLM's processes on this machine, found once after a start: those that it began, and theirs."""

    def __init__(self, llm: Any) -> None:
        manager = getattr(llm.engine_core.resources, "engine_manager", None)
        cores = [psutil.Process(process.pid) for process in getattr(manager, "processes", ())
                 if process.pid is not None and psutil.pid_exists(process.pid)]
        self.all: list[psutil.Process] = []
        for core in cores:
            try:
                self.all += [core, *core.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue

    @property
    def stopped(self) -> bool:
        """Whether one of them was stopped by a signal: it neither works nor dies until another comes."""
        return any(self._is(process, psutil.STATUS_STOPPED) for process in self.all)

    @property
    def running(self) -> bool:
        return any(process.is_running() and not self._is(process, psutil.STATUS_ZOMBIE) for process in self.all)

    def kill(self) -> None:
        """End all of them at once, stopped ones too. Theirs first, so that nothing is left behind."""
        for process in reversed(self.all):
            try:
                # A number that has gone to another process since is left alone.
                if process.is_running():
                    process.kill()
            except psutil.NoSuchProcess:
                continue

    @staticmethod
    def _is(process: psutil.Process, status: str) -> bool:
        try:
            found: str = process.status()
        except psutil.NoSuchProcess:
            return False
        return found == status
