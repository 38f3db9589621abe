"""The first principal direction, without any centring: whether to centre is the method's decision."""

import torch

from vectors.extract.refusals import FitFailed


def principal_direction(rows: torch.Tensor) -> torch.Tensor:
    """Unit vector `[d]` along which `rows [n, d]` have the largest second moment about zero."""
    n, d = rows.shape
    # The smaller of the two Gram matrices has the same non-zero spectrum, and n is far below d on real models.
    values, vectors = torch.linalg.eigh(rows @ rows.T if n < d else rows.T @ rows)
    top: torch.Tensor = vectors[:, -1]
    direction = rows.T @ top if n < d else top
    length = direction.norm()
    if not float(values[-1]) > 0 or not float(length) > 0:
        raise FitFailed("the differences of the pairs have no variance to take a principal direction from",
                        param="pairs", fix="Use pairs that differ, or the method mean_difference.")
    unit: torch.Tensor = direction / length
    return unit
