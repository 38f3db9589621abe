"""What a format is, and the registry of those that may come in over HTTP."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidPayload, InvalidRequest, PayloadTooLarge
from vectors.artifact import Limits, Metadata

# A direction no longer than this is what rounding left of zero, in any unit that activations have.
NOISE = 1e-10
# Vectors shorter than this share of the longest one in a file came from rounding in float32.
ROUNDING = 1e-7
# Room for the header of a file beside its numbers.
HEADER_BYTES = 2**20


class Format(ABC):
    """One file format. Instances hold no state."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    media_type: ClassVar[str]

    @abstractmethod
    def matches(self, data: bytes) -> bool:
        """Whether the file begins like one of this format."""

    @abstractmethod
    def read(self, data: bytes, fields: Mapping[str, Any], limits: Limits) -> tuple[Metadata, Payload]:
        """Take a file in. `fields` of the metadata win over what the file says; `name` often stands only there.

        Raises:
            InvalidPayload: malformed, or numbers that make no artifact. InvalidMetadata: its or the given metadata.
            PayloadTooLarge: beyond `limits`.
        """

    @abstractmethod
    def write(self, metadata: Metadata, payload: Payload, layers: Collection[int] | None = None) -> bytes:
        """The file. `layers`: only these.

        Raises:
            InvalidRequest: the format cannot hold this artifact, or a layer has no numbers.
        """


_FORMATS: dict[str, Format] = {}


def register(cls: type[Format]) -> type[Format]:
    """Class decorator: make the format known."""
    if cls.name in _FORMATS:
        raise ValueError(f"format {cls.name!r} is registered twice")
    _FORMATS[cls.name] = cls()
    return cls


def formats() -> tuple[Format, ...]:
    return tuple(_FORMATS[name] for name in sorted(_FORMATS))


def get_format(name: str) -> Format:
    """Raises InvalidRequest."""
    if name not in _FORMATS:
        raise InvalidRequest(f"unknown format {name[:40]!r}", param="format", fix=f"Use one of {_names()}.")
    return _FORMATS[name]


def detect(data: bytes) -> Format:
    """The format of a file, by how it begins. Raises InvalidPayload."""
    for known in formats():
        if known.matches(data):
            return known
    raise InvalidPayload("the file is of no known format", param="file", fix=f"Send one of {_names()}.")


def check_size(data: bytes, limits: Limits) -> None:
    if len(data) > limits.payload_bytes + HEADER_BYTES:
        raise PayloadTooLarge(f"the file has {len(data)} bytes, more than {limits.payload_bytes}", param="file")


def without_noise(vectors: Mapping[int, torch.Tensor]) -> tuple[dict[int, torch.Tensor], list[int]]:
    """The vectors that hold something, and the layers of those that are zero or rounding noise beside the others: made
    unit length, they would be a direction that nobody meant.

    Raises:
        InvalidPayload: none holds anything.
    """
    norms = {layer: float(vector.double().norm()) for layer, vector in vectors.items()}
    # A norm that is not finite is refused where the payload is built.
    largest = max((norm for norm in norms.values() if math.isfinite(norm)), default=0.0)
    floor = max(NOISE, largest * ROUNDING)
    left_out = [layer for layer, norm in norms.items() if norm <= floor]
    if vectors and len(left_out) == len(vectors):
        raise InvalidPayload("every vector in the file is zero, or rounding noise", param="file")
    return {layer: vector for layer, vector in vectors.items() if layer not in left_out}, left_out


def pick_layers(metadata: Metadata, payload: Payload, layers: Collection[int] | None) -> tuple[Metadata, Payload]:
    """Only these layers of the numbers, and of the metadata what goes with them."""
    if layers is None:
        return metadata, payload
    missing = sorted(set(layers) - set(payload.layers))
    if missing or not layers:
        raise InvalidRequest(f"layer {missing[0]} has no numbers" if missing else "no layer is left", param="layers",
                             fix=f"Layers with numbers: {', '.join(map(str, payload.layers))}.")
    picked = Payload.build(payload.kind, {n: tensors for n, tensors in payload.layers.items() if n in set(layers)})
    if isinstance(metadata.layers, list):
        kept = [n for n in metadata.layers if n < 0 or n in picked.layers]
        metadata = metadata.model_copy(update={"layers": kept or None})
    return metadata, picked


def _names() -> str:
    return ", ".join(known.name for known in formats())
