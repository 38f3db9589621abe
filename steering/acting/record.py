"""What the interventions of a forward pass did. It is kept on the device while the pass runs, and read once after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steering.acting.containment import Fault, StepLimit, fault_error
from steering.programs.program import Program
from steering.residency.plan import Stage


@dataclass
class Record:
    """What the interventions of a pass did: the stages in the order in which they acted, and each one's steps `[n]`, on
    the device until they are read."""

    limit: StepLimit
    stages: list[Stage] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def note(self, stage: Stage, step: Tensor) -> None:
        self.stages.append(stage)
        self.steps.append(step)

    def check(self, programs: Sequence[Program | None], width: int) -> None:
        """For a pass over a batch of sequences `[len(programs), width]`: raise the error of the first step that was not
        carried out.

        Raises:
            SteeringOverflow, SteeringLimit.
        """
        taken = self.read()
        for entry in [] if taken is None else taken.faults(self.limit)[:1].tolist():
            assert taken is not None
            number, position = divmod(int(taken.positions[entry]), width)
            program, (site, layer) = programs[number], self.stages[taken.stages[entry]].key or (None, None)
            assert program is not None
            raise fault_error(program, Fault(int(taken.interventions[entry]), site, layer, position,
                                             float(taken.values[entry])), self.limit)

    def read(self) -> "Taken | None":
        """All steps in one transfer; None where nothing acted."""
        if not self.stages:
            return None
        sizes = [len(step) for step in self.steps]
        positions = [np.arange(size) if stage.positions is None else stage.positions
                     for stage, size in zip(self.stages, sizes, strict=True)]
        return Taken(torch.cat(self.steps).cpu().numpy(), np.concatenate(positions),
                     np.repeat(np.array([stage.intervention for stage in self.stages]), sizes),
                     np.repeat(np.arange(len(self.stages)), sizes))


@dataclass(frozen=True)
class Taken:
    """Relative steps of a pass, one entry per token and stage, in the order in which they acted.

    values: float32 `[m]`, as `contain` gives them. positions: of the token in the flat batch. interventions: which of
    its program's. stages: index among those of the record.
    """

    values: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64]
    interventions: npt.NDArray[np.int64]
    stages: npt.NDArray[np.int64]

    def strongest(self, start: int, stop: int) -> int | None:
        """The intervention with the largest step among tokens `start <= position < stop`; None where none took one."""
        mine = (self.positions >= start) & (self.positions < stop) & np.isfinite(self.values)
        return int(self.interventions[mine][self.values[mine].argmax()]) if mine.any() else None

    def faults(self, limit: StepLimit) -> npt.NDArray[np.int64]:
        """Entries that were not carried out."""
        refused = np.isposinf(self.values)
        if limit.action == "refuse":
            refused |= self.values > limit.largest
        return np.flatnonzero(refused)
