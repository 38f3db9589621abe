"""Programs of one forward pass after another, each in a slot of a table of rows."""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from steering.programs.program import Program
from steering.residency.row_table import RowTable


class Bank(RowTable):
    """`num_slots` slots for programs. Slot 0 is "untouched" and always there; programs live in 1..num_slots.

    A program stays until another needs its slot, so that passes under the same one do not upload it again.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        super().__init__(num_slots, device)
        # By identity, the one that was used least recently first.
        self._slot_of: OrderedDict[str, int] = OrderedDict()

    def hold(self, programs: Sequence[Program]) -> list[int]:
        """The slots of the programs of a pass, which may be equal, all there at once.

        Raises:
            ValueError: they are more than there are slots.
        """
        distinct = {program.identity: program for program in programs}
        if len(distinct) > self.num_slots:
            raise ValueError(f"{len(distinct)} programs in one pass, and {self.num_slots} slots")
        for name in [name for name in distinct if name in self._slot_of]:
            self._slot_of.move_to_end(name)
        for name, program in distinct.items():
            if name not in self._slot_of:
                slot = self._room()
                self.place(slot, [item.rows for item in program.compiled])
                self._slot_of[name] = slot
        return [self._slot_of[program.identity] for program in programs]

    def _room(self) -> int:
        """A slot that holds no program, whose own was used least recently if none is empty."""
        if len(self._slot_of) == self.num_slots:
            _, slot = self._slot_of.popitem(last=False)
            return slot
        return next(slot for slot in range(1, self.num_slots + 1) if slot not in self._slot_of.values())
