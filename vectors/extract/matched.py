"""Random sets of units that are like a given set in all that does not matter."""

from collections.abc import Sequence

import torch


def matched_draw(chosen: Sequence[int], size: torch.Tensor, generator: torch.Generator, *, pool: int = 4
                 ) -> list[int]:
    """As many units of one layer as `chosen`, none of them in it where there are others, each drawn among the `pool`
    units nearest in `size` (selection frequency or activation, `[num_units]`) to the one it stands for.
    """
    sizes = size.double()
    left = torch.ones(len(sizes), dtype=torch.bool)
    drawn: list[int] = []
    for unit in chosen:
        others = left.clone()
        others[list(chosen)] = False
        if others.any():
            distance = (sizes - sizes[unit]).abs().masked_fill(~others, torch.inf)
            near = distance.argsort(stable=True)[:min(pool, int(others.sum()))].tolist()
        else:
            # More than half of the layer is chosen: what is left over cannot avoid the set itself.
            near = left.nonzero().flatten().tolist()
        drawn.append(near[int(torch.randint(len(near), (), generator=generator))])
        left[drawn[-1]] = False
    return sorted(drawn)
