"""What a gateway routes requests by: how much waits and runs, how full the cache is, which presets are at work.

The meaning is that of the model server protocol of the Gateway API's inference extension, whose endpoint picker reads
them from each replica and can be told their names. Where it speaks of LoRA adapters, model names whose weights are at
hand, there are presets here, whose programs are.
"""

import time
from collections.abc import Callable, Iterable

from server.engines.base import Engine
from server.observability.instruments import Gauge, Registry

MOST_NAMES = 64


class RoutingMetrics:
    """
    Args:
        queued: completions that wait in front of the engine.
        presets: model names with a preset whose requests run now.
    """

    def __init__(self, registry: Registry, engine: Engine, queued: Callable[[], float],
                 presets: Callable[[], Iterable[str]]) -> None:
        self._engine, self._presets = engine, presets
        Gauge("trimtab_num_requests_waiting", "Completions that wait, in front of the engine and in it.",
              registry=registry).set_function(lambda: queued() + engine.stats()["waiting"])
        Gauge("trimtab_num_requests_running", "Completions in the engine's batch.",
              registry=registry).set_function(lambda: engine.stats()["running"])
        # There only where the engine tells it; vLLM has vllm:kv_cache_usage_perc.
        self._cache = Gauge("trimtab_kv_cache_usage_ratio", "Share of the key-value cache's blocks in use, 0 to 1.",
                            ["engine"], registry=registry)
        self._programs = Gauge("trimtab_lora_requests_info", "Time of the reading, labelled with the presets whose "
                               "requests run now, as MODEL:PRESET, and with the slots there are for them.",
                               ["max_lora", "running_lora_adapters", "waiting_lora_adapters"], registry=registry)

    def refresh(self) -> None:
        """To be called before the registry is read."""
        stats = self._engine.stats()
        if stats.get("kv_blocks_total") and "kv_blocks_used" in stats:
            self._cache.labels("embedded").set(stats["kv_blocks_used"] / stats["kv_blocks_total"])
        names = sorted(set(self._presets()))[:MOST_NAMES]
        self._programs.clear()
        self._programs.labels(str(int(stats["slots_total"])), ",".join(names), "").set(time.time())
