"""Clients that leave in an await of a test's choosing."""

import asyncio
import itertools
import types
from collections.abc import Generator
from typing import Any


@types.coroutine
def leaving_at(work: Any, number: int) -> Generator[Any, Any, Any]:
    """Carries out the coroutine `work`, and cancels the task that does so in its await of that number, from 0 on."""
    step, argument = work.send, None
    for count in itertools.count():
        try:
            awaited = step(argument)
        except StopIteration as end:
            return end.value
        if count == number:
            asyncio.current_task().cancel()  # type: ignore[union-attr]
        try:
            step, argument = work.send, (yield awaited)
        except BaseException as error:
            step, argument = work.throw, error
