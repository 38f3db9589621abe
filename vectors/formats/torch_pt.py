"""`.pt` dictionaries, as research code leaves them. For the offline CLI: not registered, so never reached over HTTP."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steering.errors import InvalidPayload, InvalidRequest
from steering.payload import Payload
from vectors.artifact import Limits, Metadata
from vectors.formats.base import check_size

# Keys under which the directions stand where they are not the whole file.
WRAPPERS = ("vector", "vectors", "direction", "directions")
_LAYER_KEY = re.compile(r"(?:layers?[._])?([0-9]{1,6})")


def read_pt(path: Path, fields: Mapping[str, Any], limits: Limits, first_layer: int = 0) -> tuple[Metadata, Payload]:
    """Vectors from a file saved with `torch.save`, read with `weights_only=True`.

    Understood: layer -> vector `[d]` (layers as 3, "3", "layer_3", "layers.3"), one tensor `[layers, d]`, a single
    vector `[d]`, and each of these under one of the keys `vector`, `vectors`, `direction`, `directions`.

    Args:
        first_layer: the layer of row 0 of a `[layers, d]` tensor, or of a single vector. Give -1 for files whose row 0
            belongs to the embedding; that row is left out.

    Raises:
        InvalidRequest: no file there. InvalidPayload, InvalidMetadata, PayloadTooLarge: as formats do.
    """
    try:
        check_size(path.read_bytes(), limits)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", param="file") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError,
            IndexError) as error:
        raise InvalidPayload(f"{path.name} cannot be read as tensors only: {str(error)[:200]}", param="file") from error
    layers = {n: {"vector": vector} for n, vector in _vectors(content, first_layer).items()}
    if len(layers) > limits.layers:
        raise InvalidPayload(f"{len(layers)} layers, more than {limits.layers}", param="file")
    recorded = {"kind": "vector", "op": "add", "site": "resid_post",
                "provenance": {"method": "unknown", "source_format": "pt", "source_file": path.name}}
    return Metadata.parse({**recorded, **fields}), Payload.build("vector", layers)


def _vectors(content: Any, first_layer: int) -> dict[int, torch.Tensor]:
    if isinstance(content, torch.Tensor):
        rows = content.unbind(0) if content.ndim == 2 else (content,)
        return {first_layer + i: row for i, row in enumerate(rows) if first_layer + i >= 0}
    if not isinstance(content, dict) or not content:
        raise InvalidPayload("the file holds neither a tensor nor a dictionary of tensors", param="file")
    wrapped = [key for key in content if key in WRAPPERS]
    if len(wrapped) == 1:
        return _vectors(content[wrapped[0]], first_layer)
    return {_layer(key): _tensor(key, value) for key, value in content.items()}


def _layer(key: object) -> int:
    match = _LAYER_KEY.fullmatch(str(key)) if isinstance(key, (int, str)) else None
    if match is None:
        raise InvalidPayload(f"the key {str(key)[:80]!r} names no layer", param="file",
                             fix="Name layers like 3, \"3\" or \"layer_3\".")
    return int(match[1])


def _tensor(key: object, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise InvalidPayload(f"the entry {str(key)[:80]!r} is no tensor", param="file")
    return value.squeeze(0) if value.ndim == 2 and value.shape[0] == 1 else value
