"""What both engines go by when they watch what runs the model: whether it advances, and when to start it again."""

import time
from collections.abc import Callable

Clock = Callable[[], float]


class Progress:
    """Whether something advances while work waits."""

    def __init__(self, limit_s: float, clock: Clock = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._done = 0
        self._since = clock()

    def stalled(self, done: int, waits: bool) -> bool:
        """
        Args:
            done: a count that grows with every step.
            waits: whether there is work now.
        """
        if not waits or done != self._done:
            self._done, self._since = done, self._clock()
        return self._clock() - self._since >= self._limit_s


class BackOff:
    """Seconds to wait before each attempt to start something again, more with every one that did not last."""

    def __init__(self, delays_s: tuple[float, ...], limit: int, healthy_s: float,
                 clock: Clock = time.monotonic) -> None:
        """
        Args:
            delays_s: before the first attempt, the second, ...; the last one repeats.
            limit: attempts in a row that may fail before only a new process helps.
            healthy_s: a start that lasts this long ends the row.
        """
        self._delays_s, self._limit, self._healthy_s, self._clock = delays_s, limit, healthy_s, clock
        self._row = 0
        self._started: float | None = None

    @property
    def exhausted(self) -> bool:
        return self._row > self._limit

    def started(self) -> None:
        """It serves."""
        self._started = self._clock()

    def next(self) -> float:
        """It serves no more, or an attempt failed: how long to wait before the next one."""
        if self._started is not None and self._clock() - self._started >= self._healthy_s:
            self._row = 0
        self._started = None
        self._row += 1
        return self._delays_s[min(self._row, len(self._delays_s)) - 1]
