"""The batched forms of the op `sparsify`. amount `[n]`: the share of a small channel that is taken away."""

import torch

from steering.ops.kernel import Rows, kernel


@kernel("keep_largest")
def keep_largest(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Leave out the channels with the smallest |h| weight, weight `[n, d]`. How many is a length, that of left_out
    `[n, 1 + count]`, which all rows of a call share. Of equally small ones at the edge all are left out."""
    count = rows["left_out"].shape[-1] - 1
    if count == 0:
        return h
    score = h.abs() * rows["weight"]
    edge = score.kthvalue(count, dim=-1, keepdim=True).values
    return torch.where(score > edge, h, h * (1 - rows["amount"].unsqueeze(-1)))


@kernel("keep_over")
def keep_over(h: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Leave out the channels whose size is not over `cut [n, d]`."""
    return torch.where(h.abs() > rows["cut"], h, h * (1 - rows["amount"].unsqueeze(-1)))
