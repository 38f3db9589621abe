"""The requests that are being generated, so that a server that stops can end all of them with an error."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from steering.language.errors import TrimtabError


class Failing(Protocol):
    @property
    def model_names(self) -> Iterable[str]:
        """Of the presets that act in it, as MODEL:PRESET."""

    def fail(self, error: TrimtabError) -> None: ...


class Runs:
    """Used on the event loop only."""

    def __init__(self) -> None:
        self._open: set[Failing] = set()
        self._refusal: Callable[[], TrimtabError] | None = None

    def __len__(self) -> int:
        return len(self._open)

    def model_names(self) -> list[str]:
        """Names of the presets that act in open runs. May be called from any thread."""
        return [name for run in list(self._open) for name in run.model_names]

    @contextmanager
    def opened(self, run: Failing) -> Iterator[None]:
        """`run` is open in the body of the statement. Raises what `refuse` was told."""
        if self._refusal is not None:
            raise self._refusal()
        self._open.add(run)
        try:
            yield
        finally:
            self._open.discard(run)

    def refuse(self, error: Callable[[], TrimtabError]) -> None:
        """Runs that begin from now on fail with `error()`; open ones go on."""
        self._refusal = error

    def fail(self, error: Callable[[], TrimtabError]) -> int:
        """Open runs fail with `error()`, wherever they are: waiting for a slot, generating, held by a guard. Their
        readers get the tokens that are there first. Returns how many there were."""
        runs = list(self._open)
        for run in runs:
            run.fail(error())
        return len(runs)
