"""A spec compiled for one loaded model: validated against its facts, strengths turned into numbers, one row a layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steering.spec import Op, Scope, Site

Row = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Applied:
    """What the receipt says of one intervention."""

    artifact: str | None
    op: Op
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    strength: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Compiled:
    """One intervention: the rows its op reads, per (site, layer), and the tokens it touches."""

    op: Op
    scope: Scope
    rows: Mapping[tuple[Site, int], Row]
    applied: Applied


@dataclass(frozen=True)
class Program:
    """Interventions in order. Two programs with the same digest do the same to the same tokens."""

    digest: str
    compiled: tuple[Compiled, ...]
