"""Whole texts of captured activations, to be read by another model as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.activations.store import Activations
from steering.language.errors import InvalidPayload, InvalidRequest, NotFound
from steering.language.vocabulary import Site
from vectors.storage_errors import storage_error


@dataclass(frozen=True)
class WholeTexts:
    """tokens: of each text. text, position: of each row. activations: layer -> `[rows, width]`."""

    tokens: list[list[int]]
    text: Tensor
    position: Tensor
    activations: dict[int, Tensor]


def whole_texts(path: Path, described: Activations, site: Site, layers: Sequence[int], most_tokens: int) -> WholeTexts:
    """The first texts, of so many tokens at most. Blocks.

    Raises:
        InvalidRequest: there are not these layers, or not all tokens of the texts. InvalidPayload: not finite.
        NotFound: the file is gone or damaged. StorageUnavailable.
    """
    missing = [layer for layer in layers if layer not in described.sites.get(site, [])]
    if missing or described.pool != "none":
        what = "means of texts" if described.pool != "none" else f"not {site} of layer {missing[0]}"
        raise InvalidRequest(f"{described.id} has {what}", param="source", fix=f"Capture {site} of the layers "
                             f"{', '.join(map(str, layers))} at all positions, with pool none.")
    try:
        with safe_open(path, "pt") as file:
            text, position, token = (file.get_tensor(name).long() for name in ("text", "position", "token"))
            whole = _first(text, most_tokens)
            found = {layer: file.get_slice(f"{site}.{layer}")[:whole].float() for layer in layers}
    except (FileNotFoundError, SafetensorError) as error:
        raise NotFound(f"there are no activations {described.id!r}", param="source",
                       fix="They were deleted, or their time is over.") from error
    except OSError as error:
        raise storage_error(error, "the activations cannot be read") from error
    text, position, token = text[:whole], position[:whole], token[:whole]
    if not all(bool(torch.isfinite(h).all()) for h in found.values()):
        raise InvalidPayload(f"{described.id} is not finite", param="source", fix="Capture it with dtype float32.")
    begins = torch.cat([torch.tensor([True]), text[1:] != text[:-1]])
    starts = torch.nonzero(begins).flatten()
    number = begins.long().cumsum(0) - 1
    if not torch.equal(position, torch.arange(len(text)) - starts[number]):
        raise InvalidRequest(f"{described.id} has only some tokens of its texts, so that they cannot be read again",
                             param="source", fix="Capture them at all positions.")
    lengths = torch.cat([starts[1:], torch.tensor([len(text)])]) - starts
    return WholeTexts([part.tolist() for part in token.split(lengths.tolist())], number, position, found)


def _first(text: Tensor, most: int) -> int:
    """Rows of the first texts that are whole within `most` rows; those of the first one where it is longer."""
    if len(text) <= most:
        return len(text)
    inside = torch.nonzero(text[:most] != text[most]).flatten()
    return int(inside[-1]) + 1 if len(inside) else int((text == text[0]).sum())
