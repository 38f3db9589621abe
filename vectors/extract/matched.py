"""Random sets of units that are like a given set in all that does not matter."""

from collections.abc import Sequence

import torch


def matched_draw(chosen: Sequence[int], size: torch.Tensor, generator: torch.Generator, *, pool: int = 4
                 ) -> list[int]:
    """As many units of one layer as `chosen`, none of them in it where there are others, each drawn among the `pool`
    units nearest in `size` (selection frequency or activation, `[num_units]`) to the one it stands for.
    """
    taken: set[int] = set()
    free = [unit for unit in range(len(size)) if unit not in set(chosen)]
    for unit in chosen:
        near = sorted((other for other in free if other not in taken),
                      key=lambda other: (abs(float(size[other] - size[unit])), other))[:pool]
        if not near:
            # More than half of the layer is chosen: what is left over cannot avoid the set itself.
            near = [other for other in range(len(size)) if other not in taken]
        taken.add(near[int(torch.randint(len(near), (), generator=generator))])
    return sorted(taken)
