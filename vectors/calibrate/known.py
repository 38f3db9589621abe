"""Completions that were measured already, for other places of the same calibration and for one that begins again."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vectors.calibrate.bench import Trial


class Known:
    """By a name of what they were made under, in the order of the prompts.

    path: a file that keeps them, a line a batch; None for the memory alone. A line that was cut short by the end of a
    process is left out.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._trials: dict[str, list[Trial]] = {}
        for line in () if path is None or not path.exists() else path.read_text(encoding="utf-8").splitlines():
            try:
                name, start, trials = json.loads(line)
            except ValueError:
                continue
            self._put(name, start, [Trial(**trial) for trial in trials])

    def of(self, name: str) -> Sequence[Trial]:
        return self._trials.get(name, ())

    def add(self, found: Sequence[tuple[str, list[Trial]]]) -> None:
        """Those that follow on what is known of each name. Raises OSError."""
        lines = []
        for name, trials in found:
            start = len(self.of(name))
            self._put(name, start, trials)
            lines.append(json.dumps([name, start, [asdict(trial) for trial in trials]]) + "\n")
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)

    def forget(self) -> None:
        """The calibration is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _put(self, name: str, start: int, trials: list[Trial]) -> None:
        own = self._trials.setdefault(name, [])
        if len(own) == start:
            own += trials
