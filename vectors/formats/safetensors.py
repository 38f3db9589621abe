"""Trimtab's own format: safetensors with tensors "LAYER.NAME", and the metadata as JSON under one key of the header.

Other programs write their SAEs as safetensors, too. Those are told by the names of their tensors.
"""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidPayload
from vectors.artifact import InvalidMetadata, Limits, Metadata
from vectors.formats.base import HEADER_BYTES, Format, check_size, pick_layers, register
from vectors.formats.dictionaries.reading import is_dictionary, read_dictionary
from vectors.formats.dictionaries.said import split

HEADER_KEY = "trimtab"
DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8"})
# No kind has more tensors per layer.
TENSORS_PER_LAYER = 7


@register
class Safetensors(Format):
    name = "safetensors"
    suffix = ".safetensors"
    media_type = "application/octet-stream"

    def matches(self, data: bytes) -> bool:
        return data[8:9] == b"{"

    def read(self, data: bytes, fields: Mapping[str, Any], limits: Limits) -> tuple[Metadata, Payload]:
        check_size(data, limits)
        header = _header(data)
        recorded = _recorded(header.pop("__metadata__", {}))
        _check_entries(header, limits)
        if is_dictionary(header):
            return read_dictionary(_tensors(data), fields, limits)
        metadata = Metadata.parse({**recorded, **split(fields)[1]})
        return metadata, Payload.from_tensors(metadata.kind, _tensors(data))

    def write(self, metadata: Metadata, payload: Payload, layers: Collection[int] | None = None) -> bytes:
        metadata, payload = pick_layers(metadata, payload, layers)
        return save(payload.to_tensors(), metadata={HEADER_KEY: metadata.document()})


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InvalidPayload(f"malformed safetensors file: {error}", param="file") from error


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise InvalidPayload("malformed safetensors file: the header is cut off", param="file")
    if length > HEADER_BYTES:
        raise InvalidPayload(f"the header of the safetensors file has {length} bytes, more than {HEADER_BYTES}",
                             param="file")
    header = _json(data[8:8 + length], "the header of the safetensors file")
    if not isinstance(header, dict):
        raise InvalidPayload("malformed safetensors file: the header is no object", param="file")
    return header


def _recorded(notes: Any) -> dict[str, Any]:
    """The metadata that the header holds, {} in files of other makers."""
    text = notes.get(HEADER_KEY, "{}") if isinstance(notes, dict) else None
    recorded = _json(text.encode(), f"the header entry {HEADER_KEY}") if isinstance(text, str) else None
    if not isinstance(recorded, dict):
        raise InvalidMetadata(f"the header entry {HEADER_KEY} is no JSON object", param="file")
    return recorded


def _check_entries(header: dict[str, Any], limits: Limits) -> None:
    if len(header) > limits.layers * TENSORS_PER_LAYER:
        raise InvalidPayload(f"{len(header)} tensors are more than {limits.layers} layers have", param="file")
    for key, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise InvalidPayload(f"tensor {key[:80]!r} has no number format that an artifact can have", param="file",
                                 fix=f"Use one of {', '.join(sorted(DTYPES))}.")


def _json(text: bytes, what: str) -> Any:
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidPayload(f"{what} is no JSON: {error}", param="file") from error
