"""What the guard rails of one roll-out have seen, of this server since it last told the library, and of all before."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.rollouts.arms import ArmName
from server.rollouts.evidence import enough, growth, log_wealth
from server.rollouts.terms import Rail, Terms
from vectors.library.rollouts import Tally


@dataclass
class _Open:
    """Samples of a round that has not both arms yet, scaled: sums and counts."""

    sums: dict[ArmName, float] = field(default_factory=lambda: {"stable": 0.0, "candidate": 0.0})
    counts: dict[ArmName, int] = field(default_factory=lambda: {"stable": 0, "candidate": 0})


@dataclass(frozen=True)
class RailState:
    """What a rail says now. evidence: 1 and more ends the roll-out; the logarithm of the wealth over what it needs."""

    rail: Rail
    stable_count: int
    stable_mean: float | None
    candidate_count: int
    candidate_mean: float | None
    evidence: float

    @property
    def broken(self) -> bool:
        return self.evidence >= 1 and min(self.stable_count, self.candidate_count) >= self.rail.samples


class Tallies:
    """Belongs to the event loop. stored: what the library knows, of all servers."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self.stored: dict[int, Tally] = {}
        self._unstored: dict[int, Tally] = {}
        self._open = [_Open() for _ in terms.rails]

    def add(self, arm: ArmName, rail: int, value: float) -> None:
        """A sample of an answer that was given to somebody, in the unit of the rail's metric."""
        waiting = self._open[rail]
        waiting.sums[arm] += self._terms.rails[rail].scaled(value)
        waiting.counts[arm] += 1
        self._more(rail, _of(arm, value))
        if all(waiting.counts.values()):
            means = {each: waiting.sums[each] / waiting.counts[each] for each in waiting.sums}
            self._open[rail] = _Open()
            self._round(rail, means["candidate"] - means["stable"])

    def pair(self, rail: int, stable: float, candidate: float) -> None:
        """What both arms made of one prompt."""
        made = self._terms.rails[rail]
        self._more(rail, _of("stable", stable))
        self._more(rail, _of("candidate", candidate))
        self._round(rail, made.scaled(candidate) - made.scaled(stable))

    def take(self) -> dict[int, Tally]:
        """What the library does not know yet. It has to be given back where it could not be stored."""
        taken, self._unstored = self._unstored, {}
        return taken

    def give_back(self, taken: dict[int, Tally]) -> None:
        for rail, tally in taken.items():
            self._more(rail, tally)

    def states(self) -> list[RailState]:
        return [self._state(n) for n in range(len(self._terms.rails))]

    def has_samples(self, step: int) -> bool:
        """Whether every rail that gets samples in this step has them, those of the steps before counted too."""
        steps = self._terms.steps[:step + 1]
        for n in self._terms.waits_for(steps[-1]):
            total, waited = self._total(n), sum(n in self._terms.waits_for(one) for one in steps)
            if min(total.stable_count, total.candidate_count) < self._terms.rails[n].samples * waited:
                return False
        return True

    def _total(self, rail: int) -> Tally:
        return self.stored.get(rail, Tally()).plus(self._unstored.get(rail, Tally()))

    def _state(self, n: int) -> RailState:
        total = self._total(n)
        return RailState(self._terms.rails[n], total.stable_count, _mean(total.stable_sum, total.stable_count),
                         total.candidate_count, _mean(total.candidate_sum, total.candidate_count),
                         log_wealth(total.wealth) / enough(self._terms.alpha_each))

    def _round(self, rail: int, difference: float) -> None:
        made = self._terms.rails[rail]
        self._more(rail, Tally(rounds=1, wealth=tuple(growth(difference, made.margin / made.unit).tolist())))

    def _more(self, rail: int, more: Tally) -> None:
        self._unstored[rail] = self._unstored.get(rail, Tally()).plus(more)


def broken(states: Sequence[RailState]) -> str | None:
    """Why a roll-out has to end, in words; None where it may go on."""
    for state in states:
        if state.broken:
            return (f"the guard rail {state.rail.label} is broken: {state.candidate_mean:.4g} with the candidate, "
                    f"{state.stable_mean:.4g} with the stable version, a margin of {state.rail.margin:g}")
    return None


def _of(arm: ArmName, value: float) -> Tally:
    return Tally(stable_count=1, stable_sum=value) if arm == "stable" else Tally(candidate_count=1, candidate_sum=value)


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None
