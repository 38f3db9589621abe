"""The format GGUF: control vectors of llama.cpp and repeng, as `control_vectors.py` reads and writes them.

That module is imported when a file is at hand, because the gguf package takes half a second that every start of the
server would wait for.
"""

from collections.abc import Collection, Mapping
from typing import Any

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidRequest
from vectors.artifact import Limits, Metadata
from vectors.formats.base import Format, check_size, pick_layers, register

MAGIC = b"GGUF"


@register
class Gguf(Format):
    name = "gguf"
    suffix = ".gguf"
    media_type = "application/octet-stream"

    def matches(self, data: bytes) -> bool:
        return data[:4] == MAGIC

    def read(self, data: bytes, fields: Mapping[str, Any], limits: Limits) -> tuple[Metadata, Payload]:
        check_size(data, limits)
        from vectors.formats import control_vectors

        recorded, payload = control_vectors.read(data, limits)
        return Metadata.parse({**recorded, **fields}), payload

    def write(self, metadata: Metadata, payload: Payload, layers: Collection[int] | None = None) -> bytes:
        if (metadata.kind, metadata.op, metadata.site) != ("vector", "add", "resid_post"):
            raise InvalidRequest("a GGUF control vector is a vector that is added at resid_post; this is a "
                                 f"{metadata.kind} for {metadata.op} at {metadata.site}", param="format",
                                 fix="Use the format safetensors.")
        metadata, payload = pick_layers(metadata, payload, layers)
        if 0 in payload.layers:
            raise InvalidRequest("llama.cpp refuses control vectors with a layer 0", param="layers",
                                 fix="Name the layers to write, from 1 on.")
        from vectors.formats import control_vectors

        return control_vectors.write(metadata, payload)
