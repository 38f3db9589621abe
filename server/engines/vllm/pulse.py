"""Whether vLLM's processes make progress: when they were last heard of, whether work waits, and how to end them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil


class Pulse:
    """Beats with every step of vLLM's scheduler and every answer to a call; counts the work that waits for one.

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
        """Something waits for vLLM in the block."""
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


def beating(pulse: Pulse) -> Any:
    """A factory of vLLM's loggers of statistics, which are told of each step."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Beats(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, *args: Any, **kwargs: Any) -> None:
            pulse.beat()

        def log_engine_initialized(self) -> None:
            pass

    return Beats


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
