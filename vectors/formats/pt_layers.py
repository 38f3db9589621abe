"""What the content of a `.pt` file means: vectors with their layers, or rows without, and what is noted beside them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from steering.language.errors import InvalidPayload
from steering.language.vocabulary import Site

# Keys under which the directions stand where they are not the whole file.
WRAPPERS = ("vector", "vectors", "direction", "directions", "steering_vector", "layer_activations")
LAYER_KEYS = ("layer", "layers", "layer_idx", "layer_index", "layer_id", "source_layer")
STRENGTH_KEYS = ("coeff", "coefficient", "strength", "alpha", "multiplier")
# Of the package steering-vectors: which module's output the vectors were read from.
LAYER_TYPES: dict[str, Site] = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}
MOST_NOTES = 32
_LAYER_KEY = re.compile(r"(?:layers?[._])?([0-9]{1,6})")


@dataclass(frozen=True)
class Content:
    """by_layer: vectors with their layers; None where the file does not name them, then `rows` holds them in order.
    layer: of the only row, where the file says it. notes: further plain values of the file."""

    by_layer: dict[int, torch.Tensor] | None = None
    rows: tuple[torch.Tensor, ...] = ()
    layer: int | None = None
    strength: float | None = None
    site: Site | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def understand(content: Any) -> Content:
    """Raises InvalidPayload: neither vectors nor a dictionary of them."""
    if isinstance(content, torch.Tensor) or _tensors(content):
        return Content(rows=_rows(content))
    if not isinstance(content, dict) or not content:
        raise InvalidPayload("the file holds neither a tensor nor a dictionary of tensors", param="file")
    wrapped = [key for key in content if key in WRAPPERS]
    if len(wrapped) == 1:
        return _unwrapped(content[wrapped[0]], {key: value for key, value in content.items() if key != wrapped[0]})
    return Content(by_layer=_by_layer(content))


def _unwrapped(inner: Any, beside: Mapping[Any, Any]) -> Content:
    """The vectors under a wrapper, and what its dictionary says of them."""
    told = {str(key): plain for key, value in beside.items() if (plain := _plain(value)) is not None}
    layers = next((told[key] for key in LAYER_KEYS if key in told), None)
    strength = next((float(told[key]) for key in STRENGTH_KEYS if _is_number(told.get(key))), None)
    notes = dict(list(told.items())[:MOST_NOTES])
    found: dict[str, Any] = {"strength": strength, "site": _site(told), "notes": notes}
    if isinstance(inner, dict):
        return Content(by_layer=_by_layer(inner), **found)
    rows = _rows(inner)
    if isinstance(layers, list):
        if len(layers) != len(rows) or not all(isinstance(n, int) for n in layers) or len(set(layers)) != len(layers):
            raise InvalidPayload(f"the file names {len(layers)} layers for {len(rows)} rows", param="file",
                                 fix="Each row needs a layer of its own.")
        return Content(by_layer=dict(zip(layers, rows, strict=True)), **found)
    if layers is not None and (not isinstance(layers, int) or len(rows) > 1):
        raise InvalidPayload(f"the file says layer {layers!r} for {len(rows)} rows", param="file",
                             fix="Save them as {layer: vector}.")
    return Content(rows=rows, layer=layers, **found)


def _site(told: Mapping[str, Any]) -> Site | None:
    kind = told.get("layer_type")
    if kind is None:
        return None
    if kind not in LAYER_TYPES:
        raise InvalidPayload(f"layer_type is {str(kind)[:40]!r}", param="file",
                             fix=f"Known are {', '.join(LAYER_TYPES)}; or give the site with --metadata.")
    return LAYER_TYPES[kind]


def _tensors(content: Any) -> bool:
    return isinstance(content, list | tuple) and bool(content) and all(isinstance(x, torch.Tensor) for x in content)


def _rows(content: Any) -> tuple[torch.Tensor, ...]:
    if _tensors(content):
        return tuple(_vector(n, row) for n, row in enumerate(content))
    if not isinstance(content, torch.Tensor):
        raise InvalidPayload("the file holds no tensor where the vectors should be", param="file")
    if content.ndim not in (1, 2) or content.numel() == 0:
        raise InvalidPayload(f"the tensor has the shape {list(content.shape)}; understood are [d] and [layers, d]",
                             param="file")
    return content.unbind(0) if content.ndim == 2 else (content,)


def _by_layer(content: Mapping[Any, Any]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for key, value in content.items():
        layer = _layer(key)
        if layer in found:
            raise InvalidPayload(f"layer {layer} is there twice", param="file")
        found[layer] = _vector(key, value)
    if not found:
        raise InvalidPayload("the file holds no vector", param="file")
    return found


def _layer(key: object) -> int:
    match = _LAYER_KEY.fullmatch(str(key)) if isinstance(key, (int, str)) else None
    if match is None:
        raise InvalidPayload(f"the key {str(key)[:80]!r} names no layer", param="file",
                             fix="Name layers like 3, \"3\" or \"layer_3\".")
    return int(match[1])


def _vector(key: object, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise InvalidPayload(f"the entry {str(key)[:80]!r} is no tensor", param="file")
    return value.squeeze(0) if value.ndim == 2 and value.shape[0] == 1 else value


def _plain(value: Any) -> Any:
    """A number, text, truth value or a short list of whole numbers; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() <= MOST_NOTES and value.ndim <= 1:
        value = value.tolist()
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool | int | str) or _is_number(value):
        return value[:256] if isinstance(value, str) else value
    if isinstance(value, list | tuple) and all(isinstance(n, int) for n in value) and 0 < len(value) <= 1024:
        return list(value)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
