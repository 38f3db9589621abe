"""Interventions at one place, in order, as few stages of one fixed form that a compiled graph can carry out.

A stage does, to an activation h of one token:
  1. x = h + scale * h + offset            (norm 1: offset times |h|; norm 2: x given |h| back)
  2. x = x + sum_r c_r up_r, c = f(down x) (affine: f(a) = a + bias; clamp: f moves a into a range; rotate: a plane)
  3. signs of x flipped where `polarity` says
Rows that follow each other share a stage where that is exact; the order of the spec is never changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from steering.ops.base import Row
from steering.spec import Op

# Scalars of a stage in the order the graph reads them.
NUM_FIXED_SCALARS = 8
AFFINE, CLAMP, ROTATE = 0.0, 1.0, 2.0
NORM_NONE, NORM_MATCH, NORM_PRESERVE = 0.0, 1.0, 2.0
NO_FLIP = -1.0

GraphOps = Literal["vectors", "all"]
"""What a place in the graph can do: part 1 without norms, or all of a stage."""
VECTOR_OPS: tuple[Op, ...] = ("add", "affine", "patch", "mask", "neuron_mask", "head_mask")
STAGE_OPS: dict[GraphOps, tuple[Op, ...]] = {
    "vectors": VECTOR_OPS, "all": (*VECTOR_OPS, "ablate", "clamp", "rotate", "sign_flip", "manifold")}
"""Ops that come down to stages. Whether a program does is seen when it is placed: options, ranks and depths count."""


@dataclass
class Stage:
    """One stage; None where a part does nothing. down, up `[r, width]`, bias `[r]`.

    shape: AFFINE, CLAMP (numbers: low, high, amount) or ROTATE (numbers: cos, sin, absolute, adaptive).
    flip: mode and amount of `sign_flip`.
    """

    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    norm: float = NORM_NONE
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    shape: float = AFFINE
    numbers: list[float] = field(default_factory=lambda: [0.0] * 4)
    polarity: torch.Tensor | None = None
    flip: tuple[float, float] = (NO_FLIP, 0.0)

    @property
    def plain(self) -> bool:
        """Whether nothing after part 1 is in use, and part 1 has no norm."""
        return self.down is None and self.polarity is None and self.norm == NORM_NONE

    def scalars(self, rank: int) -> torch.Tensor:
        """`[NUM_FIXED_SCALARS + rank]`: norm, shape, four numbers, flip mode, flip amount, bias."""
        bias = torch.zeros(rank)
        if self.bias is not None:
            bias[:len(self.bias)] = self.bias
        return torch.cat([torch.tensor([self.norm, self.shape, *self.numbers, *self.flip]), bias])


def fuse(rows: Sequence[Row], *, depth: int, rank: int, elementwise: bool = False) -> list[Stage] | None:
    """Stages that do what `rows` do in order, or None where that takes more than `depth` stages or `rank` directions.

    Args:
        elementwise: only part 1 without norms is there (sites whose width is split among devices).
    """
    stages: list[Stage] = []
    for row in rows:
        if not stages or not _append(stages[-1], row, rank):
            stages.append(Stage())
            if len(stages) > depth or not _append(stages[-1], row, rank):
                return None
    if elementwise and not all(stage.plain for stage in stages):
        return None
    return stages


def _append(stage: Stage, row: Row, rank: int) -> bool:
    """Put `row` behind what the stage does already. False, and nothing changed, where it does not fit exactly."""
    if stage.polarity is not None:
        return False
    t = row.tensors
    match row.kernel:
        case "add":
            return _add(stage, t["delta"], rank)
        case "scale_offset":
            return _scale_offset(stage, t["scale"] - 1, t["offset"])
        case "add_norm_match" | "add_preserve_norm":
            if stage.scale is not None or stage.offset is not None or not stage.plain:
                return False
            stage.offset = t["delta"]
            stage.norm = NORM_MATCH if row.kernel == "add_norm_match" else NORM_PRESERVE
            return True
        case "affine":
            return _affine(stage, t["down"], t["up"], t["bias"], rank)
        case "clamp":
            numbers = [float(t["low"]), float(t["high"]), float(t["amount"]), 0.0]
            direction = t["direction"].unsqueeze(0)
            return _shaped(stage, CLAMP, direction, numbers, rank)
        case "rotate":
            numbers = [float(t[name]) for name in ("cos", "sin", "absolute", "adaptive")]
            return _shaped(stage, ROTATE, t["plane"], numbers, rank)
        case "sign_flip":
            if float(t["count"]) < int((t["polarity"] != 0).sum()):
                # The largest few are found by sorting, which the graph does not do.
                return False
            stage.polarity, stage.flip = t["polarity"], (float(t["mode"]), float(t["amount"]))
            return True
    return False


def _add(stage: Stage, delta: torch.Tensor, rank: int) -> bool:
    if stage.plain:
        stage.offset = delta if stage.offset is None else stage.offset + delta
        return True
    if stage.shape != AFFINE:
        return False
    # Behind other directions: one more of them that reads nothing and always writes delta.
    return _affine(stage, torch.zeros_like(delta).unsqueeze(0), delta.unsqueeze(0), torch.ones(1), rank)


def _scale_offset(stage: Stage, scale: torch.Tensor, offset: torch.Tensor) -> bool:
    if not stage.plain:
        return False
    before = torch.zeros_like(scale) if stage.scale is None else stage.scale
    moved = torch.zeros_like(offset) if stage.offset is None else stage.offset
    stage.scale = before + scale + before * scale
    stage.offset = moved + moved * scale + offset
    return True


def _affine(stage: Stage, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor, rank: int) -> bool:
    if stage.shape != AFFINE:
        return False
    if stage.down is None or stage.up is None or stage.bias is None:
        if len(bias) > rank:
            return False
        stage.down, stage.up, stage.bias = down, up, bias
        return True
    if len(stage.bias) + len(bias) > rank:
        return False
    # The second reads what the first left: its coordinates are put in terms of the first one's input.
    cross = down @ stage.up.T
    stage.down = torch.cat([stage.down, down + cross @ stage.down])
    stage.up = torch.cat([stage.up, up])
    stage.bias = torch.cat([stage.bias, bias + cross @ stage.bias])
    return True


def _shaped(stage: Stage, shape: float, directions: torch.Tensor, numbers: list[float], rank: int) -> bool:
    if stage.down is not None or len(directions) > rank:
        return False
    stage.down, stage.up = directions, directions
    stage.shape, stage.numbers = shape, numbers
    return True
