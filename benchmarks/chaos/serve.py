"""`trimtab serve` with an embedded engine that can be hurt from outside.

SIGUSR1 makes its next step of several requests fail (of one alone, that one is to blame), SIGRTMIN ends the thread of
its loop within the next step. SIGUSR2 stalls it before its next step, a second one lets it go on.

    python -m benchmarks.chaos.serve serve MODEL --port ...
"""

import signal
import threading
from typing import Any

import server.engines.transformers.engine as embedded
from server.cli import app

LONGEST_STALL_S = 600.0


class Hurt(RuntimeError):
    """What a broken step raises."""


class Trouble:
    """What the signals ask of the next step."""

    def __init__(self) -> None:
        self._fail, self._end = threading.Event(), threading.Event()
        self._free = threading.Event()
        self._free.set()

    def fail(self, *_: Any) -> None:
        self._fail.set()

    def end(self, *_: Any) -> None:
        self._end.set()

    def stall(self, *_: Any) -> None:
        if self._free.is_set():
            self._free.clear()
        else:
            self._free.set()

    def before_step(self, module: Any, arguments: Any, named: dict[str, Any]) -> None:
        # Where each request of the packed batch begins, and the end.
        if self._fail.is_set() and len(named.get("cu_seq_lens_q", ())) > 2:
            self._fail.clear()
            raise Hurt("a step fails on purpose")
        # Of the batching loop alone: passes beside it run in threads that carry what they raise to the event loop.
        if self._end.is_set() and "cu_seq_lens_q" in named:
            self._end.clear()
            raise SystemExit
        self._free.wait(LONGEST_STALL_S)


def main() -> None:
    trouble = Trouble()
    load = embedded.load_model

    def load_hurtable(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.register_forward_pre_hook(trouble.before_step, with_kwargs=True)
        return model

    embedded.load_model = load_hurtable
    signal.signal(signal.SIGUSR1, trouble.fail)
    signal.signal(signal.SIGRTMIN, trouble.end)
    signal.signal(signal.SIGUSR2, trouble.stall)
    app()


if __name__ == "__main__":
    main()
