"""Settings of the vLLM engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steering.acting.containment import UNLIMITED, StepLimit
from steering.language.vocabulary import SITES, Site


@dataclass(frozen=True)
class VllmOptions:
    """How to start vLLM.

    Attributes:
        model, model_id: folder or hub name, and the name it is served under.
        dtype: "auto" is float32 on the CPU and the checkpoint's own elsewhere.
        eager: no compiled graph.
        slots: programs resident at a time. slot_wait_s: how long a request waits for a slot before 503. slot_queue: how
        many may wait.
        max_batch_tokens, max_requests, kv_cache_tokens, max_model_len, block_size: of vLLM's scheduler and cache.
        tensor_parallel: ranks that share the model.
        sites: hooked places. graph_sites: those whose simple programs the compiled graph carries out by itself.
        graph_ops: what is simple. On a CPU "auto" is "vectors", which costs nothing where nothing acts; "all" costs one
        or two per cent there. On a GPU it is "all", as an opaque op splits a CUDA graph.
        rows: vectors of one width that the graph's pool holds. depth, rank: stages at a place, directions in a stage.
        step_limit: relative steps that are carried out and what is done with larger ones.
        kept_bytes: what completions that will be measured may keep of their own passes in a worker, all together.
        self_test: prove at start that every hooked place is reached.
        back_off_s: seconds before each attempt to start vLLM again after its process has died; the last one repeats.
        restart_limit: failures in a row after which the server itself counts as dead; it goes on trying.
        start_s: how long a start may take, proof included; 0 is any time.
        stall_s: how long nothing may come from vLLM while work waits, or a process of it be stopped, before it is ended
        and started again.
        grammar_s: how long the check of one grammar may take.
        cache_dir: where fingerprints of checkpoints are kept; None for nowhere.
        adapters: LoRA adapters to load at the start, name to folder. adapter_dir: below which others may be loaded
        later; None for none. adapters_at_once: in one batch. adapter_rank: the largest.
        extra: further arguments of vLLM's AsyncEngineArgs.
    """

    model: str
    model_id: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    eager: bool = False
    slots: int = 128
    slot_wait_s: float = 600.0
    slot_queue: int = 1024
    max_batch_tokens: int = 2048
    max_requests: int = 128
    kv_cache_tokens: int = 32768
    max_model_len: int | None = None
    block_size: int = 32
    tensor_parallel: int = 1
    share_prefixes: bool = True
    sites: tuple[Site, ...] = SITES
    graph_sites: tuple[Site, ...] = ("resid_post",)
    graph_ops: Literal["auto", "vectors", "all"] = "auto"
    rows: int = 8192
    depth: int = 1
    rank: int = 2
    step_limit: StepLimit = UNLIMITED
    kept_bytes: int = 2**28
    self_test: bool = True
    back_off_s: tuple[float, ...] = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)
    restart_limit: int = 10
    start_s: float = 0.0
    stall_s: float = 120.0
    grammar_s: float = 10.0
    cache_dir: Path | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter_dir: Path | None = None
    adapters_at_once: int = 4
    adapter_rank: int = 16
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_adapters(self) -> bool:
        return bool(self.adapters) or self.adapter_dir is not None
