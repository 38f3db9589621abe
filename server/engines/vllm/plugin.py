"""Entry point `vllm.general_plugins`: vLLM calls `register` in every process of an engine.

Inert unless Trimtab started the engine, which says so in the environment that its processes inherit. Every name that is
wrapped is private to vLLM, so `signatures` compares it with what was tested; what does not match stops the start, and a
spec is never ignored.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from typing import Any

MARKER = "TRIMTAB_VLLM_ENGINE"


def register() -> None:
    """Wrap `Worker.load_model`, the block hash and the scheduler, and give workers our methods."""
    if not os.environ.get(MARKER):
        return
    if multiprocessing.parent_process() is not None:
        # Ctrl-C reaches every process of a terminal's group. The server then drains, and needs its engine for that.
        os.setpgrp()
    from server.engines.vllm.quiet import hold_back_tracebacks, hold_back_warnings
    from server.engines.vllm.signatures import check
    from server.engines.vllm.worker import scheduling
    from server.engines.vllm.worker.cachekeys import wrap

    end_with_parent()
    hold_back_warnings()
    if multiprocessing.parent_process() is not None:
        hold_back_tracebacks()
    check()
    import torch
    import vllm.v1.core.block_pool as block_pool
    import vllm.v1.core.kv_cache_utils as kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_worker import Worker

    for module in (kv_cache_utils, block_pool):
        wrap(module)
    scheduling.wrap(Scheduler)
    _wrap_worker(Worker)
    _wrap_loading(torch.compiler)


def end_with_parent() -> None:
    """End this process when the process that began it is gone, for whatever reason, because nobody can reach an engine
    whose server was killed. In a process that multiprocessing did not begin this does nothing."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="trimtab-parent", daemon=True).start()


def _wrap_loading(compiler: Any) -> None:
    """Let vLLM take a compiled graph of its CPU mode from its cache.

    vLLM compares all that went into the graph, and every source file that was traced, and then has parts of the graph
    loaded that only its piecewise compiler makes: a graph of one piece has no such method, and was compiled again.
    """
    load = compiler.load_compiled_function
    if getattr(load, "trimtab", False):
        return

    def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda config: None
        return loaded

    load_compiled_function.trimtab = True  # type: ignore[attr-defined]
    compiler.load_compiled_function = load_compiled_function


def _wrap_worker(worker_class: Any) -> None:
    from server.engines.vllm.worker.rpc import RPC
    from server.engines.vllm.worker.state import attach

    if hasattr(worker_class, "trimtab_describe"):
        return
    for method in RPC:
        setattr(worker_class, method.__name__, method)
    load = worker_class.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        attach(self)
        return result

    load_model.trimtab = True  # type: ignore[attr-defined]
    worker_class.load_model = load_model
