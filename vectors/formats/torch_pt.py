"""`.pt` dictionaries, as research code leaves them. For the offline CLI: not registered, so never reached over HTTP.

Nothing about layers is guessed: a file says them itself (`pt_layers`), a JSON file beside it or its name does
(`pt_beside`), or the caller must.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidPayload, InvalidRequest
from vectors.artifact import Limits, Metadata
from vectors.formats.base import check_size, without_noise
from vectors.formats.pt_beside import Beside, read_beside
from vectors.formats.pt_layers import Content, understand

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
GIVE_LAYER = "Say which: --first-layer N (the layer of the vector, or of the first row; -1 if that is the embedding's)."


def read_pt(path: Path, fields: Mapping[str, Any], limits: Limits, first_layer: int | None = None
            ) -> tuple[Metadata, Payload]:
    """Vectors from a file saved with `torch.save`, read with `weights_only=True`.

    Understood: layer -> vector `[d]` (layers as 3, "3", "layer_3", "layers.3"), rows `[layers, d]`, a single vector
    `[d]`, and each of these under one of the keys in `pt_layers.WRAPPERS`, with a layer and a strength beside it.
    `provenance.layers_from` says where the layers come from, `provenance.left_out_layers` which rows held nothing.

    Args:
        first_layer: the layer of a single vector, or of the first of several rows; wins over what the file, its name
            and the JSON beside it say. Give -1 for files whose first row belongs to the embedding; that is left out.

    Raises:
        InvalidRequest: no file there. InvalidPayload, InvalidMetadata, PayloadTooLarge: as formats do; InvalidPayload
            also where nothing says the layer, or the file and its name contradict each other.
    """
    content = understand(load_pt(path, limits))
    beside = read_beside(path)
    layers, layers_from = _placed(content, beside, first_layer, path.name)
    kept, left_out = without_noise(layers)
    if len(kept) > limits.layers:
        raise InvalidPayload(f"{len(kept)} layers, more than {limits.layers}", param="file")
    provenance = {"method": "unknown", "source_format": "pt", "source_file": path.name, "layers_from": layers_from,
                  **({"left_out_layers": left_out} if left_out else {}),
                  **({"pt": content.notes} if content.notes else {})}
    recorded = {"kind": "vector", "op": "add", "site": content.site or beside.site or "resid_post",
                "provenance": provenance,
                **({} if content.strength is None else {"strength": {"value": content.strength}})}
    return Metadata.parse({**recorded, **fields}), Payload.build("vector", {n: {"vector": v} for n, v in kept.items()})


def load_pt(path: Path, limits: Limits) -> Any:
    """What `torch.save` wrote, tensors and plain values alone.

    Raises:
        InvalidRequest: no file there. InvalidPayload: it holds more than that. PayloadTooLarge.
    """
    try:
        check_size(path.read_bytes(), limits)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", param="file") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError,
            IndexError, OSError) as error:
        found = _GLOBAL.search(str(error))
        if found is not None:
            raise InvalidPayload(f"{path.name} holds a Python object ({found[1]}) and not tensors alone; such files "
                                 "can run code and are not loaded", param="file",
                                 fix="Save the tensors alone, where the file comes from: "
                                 "torch.save({layer: torch.as_tensor(vector)}, path).") from error
        raise InvalidPayload(f"{path.name} is damaged, or no file that torch.save wrote", param="file",
                             fix="Save it again with torch.save, or as safetensors.") from error


def _placed(content: Content, beside: Beside, first_layer: int | None, name: str
            ) -> tuple[dict[int, torch.Tensor], str]:
    """The vectors by layer, and what said so."""
    if content.by_layer is not None:
        if first_layer is not None:
            raise InvalidPayload(f"{name} names its layers itself: {', '.join(map(str, content.by_layer))}",
                                 param="--first-layer", fix="Leave it out.")
        return content.by_layer, "the file"
    rows = content.rows
    if first_layer is not None:
        return {first_layer + i: row for i, row in enumerate(rows) if first_layer + i >= 0}, "the option --first-layer"
    if len(rows) > 1:
        raise InvalidPayload(f"{name} holds {len(rows)} rows and does not say which layer the first belongs to",
                             param="--first-layer", fix=GIVE_LAYER)
    said = {source: layer for source, layer in (("the file", content.layer), *beside.layers) if layer is not None}
    if len(set(said.values())) > 1:
        raise InvalidPayload(f"{' and '.join(f'{source} says layer {layer}' for source, layer in said.items())}",
                             param="--first-layer", fix=GIVE_LAYER)
    if not said:
        raise InvalidPayload(f"{name} holds one vector, and nothing says its layer: not the file, not its name, no "
                             "JSON beside it", param="--first-layer", fix=GIVE_LAYER)
    source, layer = next(iter(said.items()))
    return {layer: rows[0]}, source
