"""An intervention at one place as a stage of one fixed form, which a compiled graph can carry out.

A stage does, to an activation h of one token:
  1. x = h + scale * h + offset            (norm 1: offset times |h|; norm 2: x given |h| back)
  2. x = x + sum_r c_r up_r, c = f(down x) (affine: f(a) = a + bias; clamp: f moves a into a range; rotate: a plane)
  3. signs of x flipped where `polarity` says
Interventions of a stack are stages one after another: each is measured and contained by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from steering.ops.base import Row

# Scalars of a stage in the order the graph reads them.
NUM_FIXED_SCALARS = 8
AFFINE, CLAMP, ROTATE = 0.0, 1.0, 2.0
NORM_NONE, NORM_MATCH, NORM_PRESERVE = 0.0, 1.0, 2.0
NO_FLIP = -1.0


@dataclass
class GraphStage:
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


def fuse(rows: Sequence[Row], *, depth: int, rank: int, elementwise: bool = False) -> list[GraphStage] | None:
    """Stages that do what `rows` do in order, one each, or None where there are more than `depth` of them or one is not
    of that form with up to `rank` directions.

    Args:
        elementwise: only part 1 without norms is there.
    """
    if len(rows) > depth:
        return None
    stages: list[GraphStage] = []
    for row in rows:
        stage = stage_of(row, rank)
        if stage is None or (elementwise and not stage.plain):
            return None
        stages.append(stage)
    return stages


def stage_of(row: Row, rank: int) -> GraphStage | None:
    t = row.tensors
    match row.kernel:
        case "add":
            return GraphStage(offset=t["delta"])
        case "scale_offset":
            return GraphStage(scale=t["scale"] - 1, offset=t["offset"])
        case "add_norm_match" | "add_preserve_norm":
            return GraphStage(offset=t["delta"], norm=NORM_MATCH if row.kernel == "add_norm_match" else NORM_PRESERVE)
        case "affine" if len(t["bias"]) <= rank:
            return GraphStage(down=t["down"], up=t["up"], bias=t["bias"])
        case "clamp":
            direction = t["direction"].unsqueeze(0)
            return GraphStage(down=direction, up=direction, shape=CLAMP,
                         numbers=[float(t["low"]), float(t["high"]), float(t["amount"]), 0.0])
        case "rotate" if len(t["plane"]) <= rank:
            return GraphStage(down=t["plane"], up=t["plane"], shape=ROTATE,
                         numbers=[float(t[name]) for name in ("cos", "sin", "absolute", "adaptive")])
        # The largest few are found by sorting, which the graph does not do.
        case "sign_flip" if float(t["count"]) >= int((t["polarity"] != 0).sum()):
            return GraphStage(polarity=t["polarity"], flip=(float(t["mode"]), float(t["amount"])))
    return None
