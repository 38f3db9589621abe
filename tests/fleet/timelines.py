"""What was in force when: the values of one thing that is changed again and again, as who changes it knows them.

A change is sent at one time and acknowledged at a later one. From the first on an answer may follow it; once the second
is `grace` ago, an answer that begins has to. What became of a change that was answered with a failure, or not at all,
nobody knows, so it may be followed until the next one that is acknowledged. All times are of one monotonic clock.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Anything that can be a member of a set.
Value = Any
FOR_EVER = float("inf")


@dataclass
class Change:
    value: Value
    sent: float
    acknowledged: float = FOR_EVER
    refused: bool = False


@dataclass
class Timeline:
    """Changes of one thing, none of which is sent before the one before was answered."""

    name: str
    first: Value
    changes: list[Change] = field(default_factory=list)

    def send(self, value: Value, at: float) -> Change:
        change = Change(value, at)
        self.changes.append(change)
        return change

    @property
    def last(self) -> Value:
        """What it is after the last change that was acknowledged."""
        return next((change.value for change in reversed(self.changes) if change.acknowledged < FOR_EVER), self.first)

    @property
    def open(self) -> bool:
        """Whether nobody knows which of two it is, because a later change has failed."""
        return bool(self.changes) and self.changes[-1].acknowledged == FOR_EVER and not self.changes[-1].refused

    def possible(self, began: float, ended: float, grace: float,
                 due: Callable[[float], float] = lambda acknowledged: acknowledged) -> set[Value]:
        """What an answer may follow that was asked for at one time and ended at the other.

        due: from when on a change of that time of acknowledgement is to act; later than that time where something was
            away that has to tell of it.
        """
        known = [change for change in self.changes if not change.refused]
        settled = [n for n, change in enumerate(known) if due(change.acknowledged) + grace <= began]
        before = known[settled[-1]].value if settled else self.first
        later = known[settled[-1] + 1:] if settled else known
        return {before, *(change.value for change in later if change.sent <= ended)}


def lateness(timeline: Timeline, seen: set[Value], began: float) -> float:
    """How long before `began` the change was acknowledged that made all of `seen` a thing of the past; 0 where they
    are not."""
    worst = 0.0
    for n, change in enumerate(timeline.changes):
        if change.acknowledged <= began and not seen & {one.value for one in timeline.changes[n:]}:
            worst = max(worst, began - change.acknowledged)
    return worst
