"""What an op is: which artifacts and sites it takes, how its numbers become a row, and its obvious reference form."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator

from steering.artifacts.payload import Kind
from steering.language.errors import InvalidSpec, Path
from steering.language.fields import Model
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts

Tensors = Mapping[str, torch.Tensor]
RESIDUAL_SITES: tuple[Site, ...] = ("resid_pre", "resid_post", "attn_out", "mlp_out")
VECTOR_SITES: tuple[Site, ...] = (*RESIDUAL_SITES, "head_out", "mlp_act")


@dataclass(frozen=True)
class Place:
    """Where a row will act, and how strong.

    scale: for ops that add a direction, the factor on the stored vector after the unit was applied; for the others
    the share of the change that is carried out (1 = all of it).
    """

    facts: ModelFacts
    site: Site
    layer: int
    scale: float

    @property
    def width(self) -> int:
        return self.facts.width(self.site)


@dataclass(frozen=True)
class Row:
    """One row of numbers for a kernel."""

    kernel: str
    tensors: Tensors


class Options(Model):
    """The options of an op; those of one without any.

    alternatives: groups of fields that exclude each other. A request that gives a field of one group drops the stored
    defaults of the other groups.
    belongs_to: fields that have a meaning in some modes only, with these modes. Given with another mode they would be
    ignored, so they are refused.
    """

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    belongs_to: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @model_validator(mode="after")
    def _fits_mode(self) -> Self:
        for name, modes in self.belongs_to.items():
            mode = getattr(self, "mode", None)
            if name in self.model_fields_set and mode not in modes:
                raise ValueError(f"{name} has no effect in mode {mode}; it belongs to {', '.join(modes)}")
        return self


class Operation(ABC):
    """One op. `adds_direction`: strength units other than raw have a meaning."""

    name: ClassVar[Op]
    kinds: ClassVar[tuple[Kind, ...]]
    sites: ClassVar[tuple[Site, ...]]
    options: ClassVar[type[Options]] = Options
    adds_direction: ClassVar[bool] = False

    @abstractmethod
    def row(self, tensors: Tensors, options: Any, place: Place) -> Row:
        """The row of one layer. `tensors` are those of the payload at that layer, widths already checked."""

    @abstractmethod
    def reference(self, h: torch.Tensor, tensors: Tensors, options: Any, place: Place) -> torch.Tensor:
        """What the op does to `h [T, width]`, written down plainly. Slow; for tests and for readers."""

    def direction(self, tensors: Tensors) -> torch.Tensor:
        """The vector whose length strength units refer to."""
        raise InvalidSpec(f"{self.name} has no direction; its strength unit must be raw", param=("strength", "unit"))


def length(vector: torch.Tensor) -> float:
    """Euclidean length. In double precision: squares of numbers that float32 holds may overflow or vanish in it."""
    return float(torch.linalg.vector_norm(vector.double()))


def unit(vector: torch.Tensor) -> torch.Tensor:
    """The vector scaled to length 1."""
    return (vector.double() / length(vector)).float()


def check_index(index: torch.Tensor, limit: int, what: str, param: str | Path) -> None:
    """Refuse an index at or over `limit`."""
    largest = int(index.max())
    if largest >= limit:
        raise InvalidSpec(f"{what} {largest} does not exist; the model has {limit}", param=param, value=largest)
