"""From the engine's thread to the event loops of the callers."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


def on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[T], None], argument: T) -> None:
    """Have an event loop call something. One that is closed has nobody left to tell."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, argument)
