"""The instruments of all metrics: prometheus_client's, but for values that cannot be summed up.

One NaN makes a counter NaN for the life of the process, and one number of absurd size swallows all that are added to
it afterwards: either silences every alert on it. Such values are counted, logged and left out; the rest is kept.
"""

import math
from typing import Any, Self

import prometheus_client
import structlog
from prometheus_client import CollectorRegistry

log = structlog.get_logger("trimtab.metrics")
# Beyond this, what is added to a sum of 64-bit floats begins to drown in it.
LARGEST = 1e12


class Registry(CollectorRegistry):
    """A registry with the count of what its instruments left out."""

    def __init__(self) -> None:
        super().__init__()
        self._refused = prometheus_client.Counter(
            "trimtab_observations_refused", "Values that were not finite, or absurdly large, and were left out of the "
            "metric.", ["metric"], registry=self)

    def admits(self, metric: str, value: float, largest: float = math.inf) -> bool:
        """Whether `metric` may take `value`. What it may not is counted and logged here."""
        if math.isfinite(value) and abs(value) <= largest:
            return True
        self._refused.labels(metric).inc()
        log.warning("observation_refused", metric=metric, value=repr(value))
        return False


class _Watched(prometheus_client.metrics.MetricWrapperBase):
    """An instrument that asks its registry about every value; its children ask the same one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._registry: Registry | None = options.get("registry")
        super().__init__(*arguments, **options)

    def labels(self, *labelvalues: object, **labelkwargs: object) -> Self:
        child = super().labels(*labelvalues, **labelkwargs)
        child._registry = self._registry
        return child

    def _admits(self, value: float, largest: float = math.inf) -> bool:
        assert self._registry is not None
        return self._registry.admits(self._name, value, largest)


class Counter(_Watched, prometheus_client.Counter):
    """A sum that only rises."""

    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        if self._admits(amount, LARGEST):
            super().inc(amount, exemplar)


class Gauge(_Watched, prometheus_client.Gauge):
    """A number as it stands. It is only ever set, or read by a function."""

    def set(self, value: float) -> None:
        if self._admits(float(value)):
            super().set(value)


class Histogram(_Watched, prometheus_client.Histogram):
    """Counts of values by size, and their sum."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        if self._admits(amount, LARGEST):
            super().observe(amount, exemplar)
