"""Shares of outcomes with what is known of them from so many texts."""

from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Share:
    """`count` of `total`, and the 95 % interval of the share (Wilson)."""

    count: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> "Share":
        interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
        return cls(count, total, float(interval.low), float(interval.high))

    @property
    def value(self) -> float:
        return self.count / self.total
