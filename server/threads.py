"""Work in threads: one helper, and one rule of cancellation (docs/decisions/0005-threads-and-cancellation.md).

A thread cannot be stopped. So who started one stays until it has ended, also when cancelled: locks, hooks and buffers
that the work uses are held as long as it uses them, and not as long as somebody wants its result.

What a thread raises is carried to the event loop, and `SystemExit` or `KeyboardInterrupt` would end the loop and the
server with it. A signal never raises either of them in a thread, so here they are failures of the work like any other.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import anyio
import anyio.to_thread
import structlog

from server.errors import InternalError
from steering.language.errors import TrimtabError

log = structlog.get_logger(__name__)
T = TypeVar("T")
P = ParamSpec("P")
Arguments = TypeVarTuple("Arguments")


def contained(work: Callable[P, T], failure: type[TrimtabError] = InternalError) -> Callable[P, T]:
    """`work` for a thread, with a `failure` in the place of an exception that would end the event loop."""

    @wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        except Exception:
            raise
        except BaseException as error:
            log.error("thread_asked_to_end", exc_info=error)
            raise failure(f"work in a thread was told to end ({type(error).__name__})") from error

    return run


async def in_thread(work: Callable[[*Arguments], T], *arguments: *Arguments,
                    limiter: anyio.CapacityLimiter | None = None, failure: type[TrimtabError] = InternalError) -> T:
    """The result of `work(*arguments)`, run in a thread. Cancelled while it waits for a thread, the work never begins;
    cancelled later, the cancellation is raised once the work has ended.

    Args:
        limiter: how many such works may run at once; by default anyio's own for the event loop.
        failure: raised in the place of an exception that would end the event loop.
    """
    async with limiter or anyio.to_thread.current_default_thread_limiter():
        # A limiter of its own, as its turn came above: what is begun below has a thread.
        working = asyncio.ensure_future(anyio.to_thread.run_sync(
            contained(partial(work, *arguments), failure), limiter=anyio.CapacityLimiter(1)))
        cancelled: asyncio.CancelledError | None = None
        # The shield holds back anyio's cancellation, which would be repeated in every turn of the loop; asyncio's own
        # comes through once.
        with anyio.CancelScope(shield=True):
            while not working.done():
                try:
                    await asyncio.wait({working})
                except asyncio.CancelledError as error:
                    cancelled = error
    if cancelled is None:
        return working.result()
    if not working.cancelled():
        # Nobody is left to hear of it.
        working.exception()
    raise cancelled


async def all_or_none(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results, in order. If one fails, or nobody waits any more, the others are not left to run on."""
    running = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
