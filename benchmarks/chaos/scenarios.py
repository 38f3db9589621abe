"""One kind of trouble each. What must not have happened is a fault. A server that they end is started again after."""

from collections.abc import Awaitable, Callable

from benchmarks.chaos import asking, ending, keeping
from benchmarks.chaos.chaos import Chaos

Scenario = Callable[[Chaos], Awaitable[None]]

SCENARIOS: dict[str, Scenario] = {each.__name__: each for each in (
    asking.poisonous_values, asking.cancellations, asking.slow_and_dead_clients, asking.floods, keeping.switches,
    keeping.locked_database, keeping.disk_full, keeping.read_only, ending.engine_fails, ending.engine_stalls,
    asking.mixed, asking.mutated_files, ending.terminate, keeping.kill_uploads, asking.offloading)}
