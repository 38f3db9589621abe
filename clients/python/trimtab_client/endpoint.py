"""Methods written once for both clients.

An endpoint is a plain function that describes one request, or several after another. As an attribute of a client it is
a method with the same parameters: on `Client` it returns the result, on `AsyncClient` an awaitable of it.
"""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from trimtab_client.flow import Call, Flow, Stream

P = ParamSpec("P")
T = TypeVar("T")


class Blocking(Protocol):
    """Runs requests and returns when they are done."""

    def run(self, work: Call[T] | Flow[T]) -> T: ...
    def iterate(self, work: Flow[Stream[T]]) -> Iterator[T]: ...


class Awaiting(Protocol):
    """Runs requests while it is awaited."""

    async def run(self, work: Call[T] | Flow[T]) -> T: ...
    def iterate(self, work: Flow[Stream[T]]) -> AsyncIterator[T]: ...


class Endpoint(Generic[P, T]):
    """A request with one answer."""

    def __init__(self, describe: Callable[P, Call[T]] | Callable[P, Flow[T]]) -> None:
        self._describe = describe

    @overload
    def __get__(self, client: Blocking, owner: Any = None) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, owner: Any = None) -> Callable[P, Awaitable[T]]: ...
    def __get__(self, client: Any, owner: Any = None) -> Any:
        return _bound(self._describe, client.run)


class StreamEndpoint(Generic[P, T]):
    """A request answered piece by piece."""

    def __init__(self, describe: Callable[P, Flow[Stream[T]]]) -> None:
        self._describe = describe

    @overload
    def __get__(self, client: Blocking, owner: Any = None) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, client: Awaiting, owner: Any = None) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, client: Any, owner: Any = None) -> Any:
        return _bound(self._describe, client.iterate)


def _bound(describe: Callable[..., Any], run: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(describe)
    def method(*args: Any, **kwargs: Any) -> Any:
        return run(describe(*args, **kwargs))

    return method
