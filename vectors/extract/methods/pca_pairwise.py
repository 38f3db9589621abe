"""Principal direction of the pairs about their own midpoints."""

import torch

from vectors.extract.contrastive import Contrastive
from vectors.extract.principal import principal_direction


class PcaPairwise(Contrastive):
    """Each pair's midpoint is subtracted and both halves are stacked, so the rows are plus and minus half of each
    difference. Their mean is zero by construction: centring, which would remove the shift that all pairs share when
    the differences themselves are centred, has nothing to remove here.
    """

    name = "pca_pairwise"
    summary = "first principal direction of the texts about the midpoint of their pair"

    def fit(self, positive: torch.Tensor, negative: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        half = (positive - negative) / 2
        return principal_direction(torch.cat([half, -half]))


METHOD = PcaPairwise()
