"""The target's activations of the texts that the source read."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steering.language.vocabulary import Site
from vectors.extract.subject import Subject, stream
from vectors.porting.run import Progress, Rows


def read_rows(tokens: Sequence[Sequence[int]], source: Mapping[int, Tensor], text: Tensor, position: Tensor, site: Site,
              candidates: Mapping[int, Sequence[int]], target: Subject, progress: Progress) -> Rows:
    """
    Args:
        tokens: of each text. source: layer -> activations of them all, `[rows, width]`. text, position: of each row.
            candidates: layers of the target that are tried, by layer of the source.

    Raises:
        FitFailed: the target gave an activation that is not finite. TrimtabError: as the model.
    """
    layers = sorted({layer for some in candidates.values() for layer in some})
    found: list[Mapping[int, Tensor]] = [found for _, found in stream(
        target, tokens, site, layers, None, lambda share: progress(share, "read"))]
    return Rows(source, {layer: torch.cat([one[layer] for one in found]) for layer in layers}, text, position)
