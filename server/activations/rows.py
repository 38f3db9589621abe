"""One token of captured activations, read from its file. Only what is asked for is read, however large the file is."""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.activations.store import Activations
from steering.language.errors import InvalidPayload, InvalidRequest, NotFound
from steering.language.vocabulary import Site
from vectors.storage_errors import storage_error

# Field of the file's metadata: the positions of each text as they were asked for, null for all.
POSITIONS = "positions"


@dataclass(frozen=True)
class Row:
    """Which row: its number, or a text, None for the only one, and a position of it, None for the only one."""

    text: int | None = None
    position: int | None = None
    number: int | None = None


def read_row(path: Path, described: Activations, site: Site, layers: Sequence[int], row: Row) -> Mapping[int, Tensor]:
    """Layer -> activation `[width]` float32, a copy that does not need the file any more. Blocks.

    Raises:
        InvalidRequest: there is no such row; `param` is text, positions or row.
        InvalidPayload: the numbers are not finite.
        NotFound: the file is gone or damaged. StorageUnavailable.
    """
    try:
        with safe_open(path, "pt") as file:
            number = _number(file, described, row)
            found = {layer: file.get_slice(f"{site}.{layer}")[number:number + 1][0].float().clone()
                     for layer in layers}
    except (FileNotFoundError, SafetensorError) as error:
        raise NotFound(f"there are no activations {described.id!r}", param="source",
                       fix="They were deleted, or their time is over.") from error
    except OSError as error:
        raise storage_error(error, "the activations cannot be read") from error
    for layer, values in found.items():
        if not bool(torch.isfinite(values).all()):
            raise InvalidPayload(f"row {number} of {described.id} is not finite at layer {layer}", param="source",
                                 fix="Capture it with dtype float32.")
    return found


def _number(file: Any, described: Activations, row: Row) -> int:
    if row.number is not None:
        if row.number >= described.rows:
            raise InvalidRequest(f"{described.id} has {described.rows} rows", param="row",
                                 fix=f"Use 0 to {described.rows - 1}.")
        return row.number
    first, stop = _rows_of(file, described, row.text)
    if described.pool == "mean":
        if row.position is not None:
            raise InvalidRequest(f"the rows of {described.id} are means of texts and have no positions",
                                 param="positions", fix="Leave positions out, or capture with pool none.")
        return first
    if row.position is None:
        if stop - first > 1:
            raise InvalidRequest(f"{stop - first} tokens of this text were captured, and it is not said which one is "
                                 "meant", param="positions", fix='Give "positions": [N].')
        return first
    place = _place(file, first, stop, row.position)
    if place is None:
        raise InvalidRequest(f"position {row.position} of this text was not captured", param="positions",
                             fix="Name a position from its start that was captured, or one as the capture was asked.")
    return place


def _rows_of(file: Any, described: Activations, text: int | None) -> tuple[int, int]:
    """The rows of a text, which lie together, and the texts in their order."""
    if text is None:
        if described.texts > 1:
            raise InvalidRequest(f"{described.id} is of {described.texts} texts, and it is not said which one is "
                                 "meant", param="text", fix='Give "text": N, from 0.')
        return 0, described.rows
    if text >= described.texts:
        raise InvalidRequest(f"{described.id} is of {described.texts} texts", param="text",
                             fix=f"Use 0 to {described.texts - 1}.")
    column = file.get_slice("text")
    first = bisect_left(range(described.rows), text, key=lambda n: int(column[n:n + 1]))
    return first, bisect_right(range(described.rows), text, lo=first, key=lambda n: int(column[n:n + 1]))


def _place(file: Any, first: int, stop: int, position: int) -> int | None:
    if position >= 0:
        matching = (file.get_slice("position")[first:stop] == position).nonzero()
        return first + int(matching[0]) if len(matching) else None
    asked = json.loads((file.metadata() or {}).get(POSITIONS, "[]"))
    if asked is None:
        return stop + position if stop + position >= first else None
    return first + asked.index(position) if position in asked else None
