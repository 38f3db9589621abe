"""The queue of jobs: in the order they came, but short ones pass long ones, also one that runs.

A job that is known to be short passes those that are several times as long. They may lose half of their own length in
this way and no more, so that many short jobs do not hold up a long one for ever. A job that passes is not passed
itself, so never more than two are under way.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

# How many times as long a job must be to be passed, what share of its length it may lose so, and how long one is taken
# to be of which nobody knows.
TIMES, LOSS, UNKNOWN_S = 4.0, 0.5, 600.0


class Queued(Protocol):
    @property
    def estimate_s(self) -> float | None: ...

    @property
    def progress(self) -> float: ...


J = TypeVar("J", bound=Queued)


@dataclass(eq=False)
class _Place(Generic[J]):
    """lost_s: how long all those take that passed it."""

    job: J
    lost_s: float = 0.0

    @property
    def length_s(self) -> float:
        return UNKNOWN_S if self.job.estimate_s is None else self.job.estimate_s

    @property
    def left_s(self) -> float:
        return self.length_s * (1 - self.job.progress)

    def may_pass(self, other: "_Place[J]") -> bool:
        return (self.job.estimate_s is not None and self.left_s * TIMES <= other.left_s
                and other.lost_s + self.left_s <= LOSS * other.length_s)


class Line(Generic[J]):
    """Used on the event loop."""

    def __init__(self) -> None:
        self._places: list[_Place[J]] = []
        self._turn: _Place[J] | None = None

    def join(self, job: J) -> None:
        self._places.append(_Place(job))
        self._choose()

    def leave(self, job: J) -> None:
        """Does nothing for one that is not there."""
        self._places = [place for place in self._places if place.job is not job]
        if self._turn is not None and self._turn.job is job:
            self._turn = None
        self._choose()

    def order(self) -> list[J]:
        """The job whose turn it is, then all others."""
        return [place.job for place in sorted(self._places, key=lambda place: place is not self._turn)]

    def _choose(self) -> None:
        if not self._places:
            return
        first = self._places[0]
        if self._turn not in (None, first):
            return
        self._turn = first
        for n, place in sorted(enumerate(self._places), key=lambda pair: pair[1].left_s):
            ahead = self._places[:n]
            if ahead and all(place.may_pass(other) for other in ahead):
                for other in ahead:
                    other.lost_s += place.left_s
                self._turn = place
                return
