"""No metric takes a value that would spoil it for good, and every metric of the server is made so."""

import ast
import math
from pathlib import Path

import pytest

from server.observability.instruments import Counter, Gauge, Histogram, Registry

SERVER = Path(__file__).parents[2] / "server"
BAD = [math.nan, math.inf, -math.inf]


def value(registry: Registry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


@pytest.mark.parametrize("bad", [*BAD, 1e30])
def test_sums_leave_out_what_would_spoil_them_and_count_it(bad: float) -> None:
    registry = Registry()
    counter = Counter("c", "", ["artifact"], registry=registry)
    histogram = Histogram("h", "", ["artifact"], buckets=(1.0,), registry=registry)
    for amount in (0.25, bad, 0.5):
        counter.labels("a").inc(amount)
        histogram.labels("a").observe(amount)
    counter.labels("a").inc()
    assert value(registry, "c_total", artifact="a") == 1.75
    assert (value(registry, "h_sum", artifact="a"), value(registry, "h_count", artifact="a")) == (0.75, 2)
    assert [value(registry, "trimtab_observations_refused_total", metric=name) for name in "ch"] == [1, 1]


@pytest.mark.parametrize("bad", BAD)
def test_a_gauge_keeps_its_last_value(bad: float) -> None:
    registry = Registry()
    gauge = Gauge("g", "", registry=registry)
    gauge.set(3e15)
    gauge.set(bad)
    assert value(registry, "g") == 3e15


def test_every_metric_of_the_server_is_made_here() -> None:
    users = set()
    for path in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom | ast.Import) else set()
            if isinstance(node, ast.ImportFrom) and node.module == "prometheus_client":
                users |= {path.name for name in names & {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}}
            elif "prometheus_client" in names:
                users.add(path.name)
    assert users == {"instruments.py"}
