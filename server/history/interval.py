"""What was counted in a stretch of time. Intervals can be added: minutes make hours, and servers make a fleet."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Level:
    """A number that goes up and down, looked at now and then."""

    total: float = 0.0
    looks: int = 0
    most: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.looks if self.looks else 0.0

    def add(self, other: "Level") -> None:
        self.total += other.total
        self.looks += other.looks
        self.most = max(self.most, other.most)


@dataclass
class Spread:
    """How long things took. counts: how many lie in the bucket that ends at a bound, in seconds."""

    total: float = 0.0
    counts: dict[float, float] = field(default_factory=dict)

    @property
    def count(self) -> float:
        return sum(self.counts.values())

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """Linear within its bucket, as Prometheus reckons it; beyond the last finite bound that bound itself. None of
        nothing."""
        wanted, below, lower = share * self.count, 0.0, 0.0
        if not wanted:
            return None
        for bound in sorted(self.counts):
            inside = self.counts[bound]
            if below + inside >= wanted:
                return lower if bound == float("inf") else lower + (bound - lower) * (wanted - below) / inside
            below, lower = below + inside, bound
        return lower

    def add(self, other: "Spread") -> None:
        self.total += other.total
        for bound, count in other.counts.items():
            self.counts[bound] = self.counts.get(bound, 0.0) + count


@dataclass
class Interval:
    """sums: by what was counted. parts: the same by a label. spreads: durations. levels: numbers that go up and down,
    where there are several of a kind by its name and their labels, with spaces between. What did not happen is left
    out, so that an idle minute takes next to nothing."""

    sums: dict[str, float] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    levels: dict[str, Level] = field(default_factory=dict)

    @classmethod
    def of(cls, intervals: Iterable["Interval"]) -> Self:
        found = cls()
        for one in intervals:
            found.add(one)
        return found

    def add(self, other: "Interval") -> None:
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, values in other.parts.items():
            own = self.parts.setdefault(name, {})
            for label, value in values.items():
                own[label] = own.get(label, 0.0) + value
        for name, spread in other.spreads.items():
            self.spreads.setdefault(name, Spread()).add(spread)
        for name, level in other.levels.items():
            self.levels.setdefault(name, Level()).add(level)

    def total(self, name: str) -> float:
        return self.sums.get(name, 0.0)

    def by(self, name: str) -> Mapping[str, float]:
        return self.parts.get(name, {})

    def spread(self, name: str) -> Spread:
        return self.spreads.get(name, Spread())

    def level(self, name: str) -> Level:
        return self.levels.get(name, Level())

    def levels_by(self, name: str) -> Mapping[str, Level]:
        """Those of a kind, by their labels."""
        return {key.removeprefix(f"{name} "): level for key, level in self.levels.items() if key.startswith(f"{name} ")}

    def to_json(self) -> str:
        return json.dumps({
            "sums": self.sums, "parts": self.parts,
            "spreads": {name: [s.total, {str(bound): count for bound, count in s.counts.items()}]
                        for name, s in self.spreads.items()},
            "levels": {name: [one.total, one.looks, one.most] for name, one in self.levels.items()}},
            separators=(",", ":"))

    @classmethod
    def from_json(cls, document: str) -> Self:
        found = json.loads(document)
        spreads = {name: Spread(total, {float(bound): count for bound, count in counts.items()})
                   for name, (total, counts) in found["spreads"].items()}
        return cls(found["sums"], found["parts"], spreads,
                   {name: Level(*values) for name, values in found["levels"].items()})


def buckets(rows: Iterable[tuple[int, Interval]], width: int) -> dict[int, Interval]:
    """Intervals by the start of the bucket in which theirs lies; `width` and starts in seconds."""
    found: dict[int, Interval] = defaultdict(Interval)
    for start, interval in rows:
        found[start - start % width].add(interval)
    return dict(sorted(found.items()))
