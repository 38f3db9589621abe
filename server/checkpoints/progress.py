"""How work on a model says how far it is."""

from typing import Protocol


class Progress(Protocol):
    def __call__(self, what: str, done: int, total: int) -> None:
        """what: the step in words, the same words as long as it is the same step. total: 0 where it is not known."""
        ...


def silent(what: str, done: int, total: int) -> None:
    """Nobody is told."""
