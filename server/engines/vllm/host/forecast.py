"""Forecasts when vLLM will serve again, from how long its last start took and how long this one has taken."""

import time
from collections.abc import Callable, Sequence

from server.engines.data import Condition, Unready

# Assumed length of a start while none has been measured.
GUESS_S = 60.0


class Forecast:
    """Of one engine.

    Args:
        back_off_s: pauses before the attempts to start it again; the last one repeats.
        attempts: failures in a row after which only a new process of the server is expected to help.
        clock: seconds that only rise.

    Attributes:
        launch_s: how long a start takes. stopped: it is told to end. hung: what stalled could not be ended.
    """

    def __init__(self, back_off_s: Sequence[float], attempts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._back_off_s, self._attempts, self._clock = back_off_s, attempts, clock
        self._failures = 0
        self._began = clock()
        self.launch_s = GUESS_S
        self.stopped = False
        self.hung = False

    def pause(self) -> float:
        """Seconds to wait before the coming attempt."""
        seconds = self._back_off_s[min(self._failures, len(self._back_off_s) - 1)]
        self._began = self._clock() + seconds
        return seconds

    def begins(self) -> None:
        self._began = self._clock()

    def done(self) -> None:
        self.launch_s = self._clock() - self._began
        self._failures = 0
        self.hung = False

    def failed(self) -> None:
        self._failures += 1

    def condition(self, reason: Unready) -> Condition:
        """The condition of an engine that does not serve, for `reason` unless something worse is known."""
        if self.stopped:
            return Condition(ready=False, reason="stopped")
        if self.hung:
            return Condition(ready=False, live=False, reason="hung")
        # A start that has taken longer than the last one is expected to be over soon.
        expected = max(self._began + self.launch_s - self._clock(), 1.0)
        exhausted = self._failures >= max(self._attempts, 1)
        return Condition(ready=False, live=not exhausted, reason="exhausted" if exhausted else reason,
                         retry_after_s=expected)
