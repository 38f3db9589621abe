"""Wall and processor seconds of each step of a run."""

import os
import time
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


class Clock:
    """pid: the process whose processor seconds are counted, the server's; without it they are None."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._last = time.monotonic(), self._cpu()
        self.seconds: dict[str, dict[str, float | None]] = {}

    def lap(self, step: str) -> None:
        now = time.monotonic(), self._cpu()
        self.seconds[step] = {"wall": round(now[0] - self._last[0], 1),
                              "cpu": None if self._pid is None else round(now[1] - self._last[1], 1)}
        self._last = now
        print(step, self.seconds[step], flush=True)

    def _cpu(self) -> float:
        stat = Path(f"/proc/{self._pid}/stat")
        if not stat.exists():
            return 0.0
        after_name = stat.read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / TICK
