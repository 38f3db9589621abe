"""What a method is, and the registry of methods."""

from abc import ABC, abstractmethod
from typing import ClassVar, get_args

import torch

from vectors.extract.contract import MethodName

METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)


class Method(ABC):
    """One way to take a direction from the activations of pairs at one layer.

    `summary` is one line for people.
    """

    name: ClassVar[MethodName]
    summary: ClassVar[str]

    @abstractmethod
    def fit(self, positive: torch.Tensor, negative: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A direction `[d]` of any length and sign. positive, negative: `[num_pairs, d]` float64, row i is pair i.

        Raises:
            FitFailed: no direction was found.
        """


_METHODS: dict[str, Method] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make the method known. Each name is registered once."""
    if cls.name in _METHODS:
        raise ValueError(f"method {cls.name!r} is registered twice")
    if cls.name not in METHOD_NAMES:
        raise ValueError(f"method {cls.name!r} is not part of the contract")
    _METHODS[cls.name] = cls()
    return cls


def get_method(name: MethodName) -> Method:
    return _METHODS[name]


def methods() -> tuple[Method, ...]:
    return tuple(_METHODS[name] for name in sorted(_METHODS))
