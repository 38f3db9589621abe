"""Settings of the embedded engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steering.acting.containment import UNLIMITED, StepLimit


@dataclass(frozen=True)
class EngineOptions:
    """How to load and run a model.

    Attributes:
        model: folder or hub name in Hugging Face form.
        model_id: name it is served under.
        device: "auto" takes CUDA, then MPS, then the CPU.
        dtype: "auto" is float32 on the CPU and the checkpoint's own elsewhere.
        slots: programs resident at a time.
        slot_wait_s: how long a request waits for a slot before 503. slot_queue: how many may wait.
        max_batch_tokens: tokens of one forward pass; longer prompts are prefilled in chunks.
        max_requests: requests in one batch.
        kv_cache_tokens: tokens the key-value cache holds, shared by all requests.
        page_size: tokens of one cache page, the unit of prefix sharing.
        share_prefixes: reuse cached prefixes between requests that do the same to them.
        step_limit: relative steps that are carried out and what is done with larger ones.
        stall_s: how long work may wait without a step or a pass that ends before the loop is taken to hang.
        restart_limit: starts in a row that may fail before only a new process helps. back_off_s: seconds before each;
            the last one repeats.
        kept_bytes: what completions that will be measured may keep of their own passes, all together.
        grammar_s: how long one grammar may take to compile. grammar_cache_bytes: of compiled ones that are kept.
        cache_dir: where fingerprints of checkpoints are kept; None for nowhere.
        self_test: prove at start that every offered site is reached.
    """

    model: str
    model_id: str
    cache_dir: Path | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    slots: int = 128
    slot_wait_s: float = 600.0
    slot_queue: int = 1024
    max_batch_tokens: int = 512
    max_requests: int = 128
    kv_cache_tokens: int = 32768
    page_size: int = 16
    share_prefixes: bool = True
    step_limit: StepLimit = UNLIMITED
    kept_bytes: int = 2**28
    grammar_s: float = 10.0
    grammar_cache_bytes: int = 2**26
    self_test: bool = True
    stall_s: float = 60.0
    restart_limit: int = 6
    back_off_s: tuple[float, ...] = (0.1, 1.0, 2.0, 5.0, 15.0, 30.0)
