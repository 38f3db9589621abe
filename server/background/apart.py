"""The thread in which a job computes: one of its own, of low priority, that is left behind if the job must end."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import TypeVar

import torch

from server.threads import contained

T = TypeVar("T")
# Of one thread, where the system knows such a thing.
NICE = 10
# How long a thread that computes in Python keeps the interpreter from one that waits for it. A pass of the model asks
# for it again after each of its hundreds of operations, and would wait for Python's own 5 ms every time.
QUICK_S = 0.001
_lock = threading.Lock()
_computing, _before = 0, sys.getswitchinterval()


async def apart(work: Callable[[], T]) -> T:
    """The result of `work()`.

    Cancelled, it does not wait for the thread, unlike `server.threads.in_thread`. That is right here only because a job
    holds nothing that others need: it asks for every pass by `Control.result`, which refuses a job that is cancelled.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        _give_way()
        result, failure = None, None
        try:
            with _quick_turns():
                result = contained(work)()
        except Exception as error:  # raised where the result is awaited
            failure = error
        # The loop may be gone, and with it whoever waited.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failure)

    # Whoever asked for the job is who its changes are recorded for.
    threading.Thread(target=copy_context().run, args=(run,), name="trimtab-job", daemon=True).start()
    return await done


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Threads take turns quickly while any of this kind computes."""
    global _before, _computing
    with _lock:
        if not _computing:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(min(_before, QUICK_S))
        _computing += 1
    try:
        yield
    finally:
        with _lock:
            _computing -= 1
            if not _computing:
                sys.setswitchinterval(_before)


def _give_way() -> None:
    """Leave the processor to the threads of requests. The number of torch's threads is one of the calling thread."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        with suppress(OSError):
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, max(os.getpriority(os.PRIO_PROCESS, own), NICE))
