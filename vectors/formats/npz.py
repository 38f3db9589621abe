"""The format npz of numpy, in which SAEs are published. Arrays of Python objects, which can run code, are not read."""

import io
import zipfile
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidPayload, InvalidRequest, PayloadTooLarge
from vectors.artifact import Limits, Metadata
from vectors.formats.base import HEADER_BYTES, Format, check_size, register
from vectors.formats.dictionaries.reading import MOST_TENSORS, read_dictionary

MAGIC = b"PK\x03\x04"


@register
class Npz(Format):
    name = "npz"
    suffix = ".npz"
    media_type = "application/octet-stream"

    def matches(self, data: bytes) -> bool:
        return data[:4] == MAGIC

    def read(self, data: bytes, fields: Mapping[str, Any], limits: Limits) -> tuple[Metadata, Payload]:
        check_size(data, limits)
        return read_dictionary(arrays(data, limits), fields, limits)

    def write(self, metadata: Metadata, payload: Payload, layers: Collection[int] | None = None) -> bytes:
        raise InvalidRequest("artifacts are not written as npz", param="format", fix="Use the format safetensors.")


def arrays(data: bytes, limits: Limits) -> dict[str, torch.Tensor]:
    """
    Raises:
        InvalidPayload: damaged, no npz, or arrays of what is no number. PayloadTooLarge.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) > MOST_TENSORS:
                raise InvalidPayload(f"{len(members)} arrays are more than an SAE has", param="file")
            # A few bytes can unpack to gigabytes.
            if sum(member.file_size for member in members) > limits.payload_bytes + HEADER_BYTES:
                raise PayloadTooLarge(f"the arrays unpack to more than {limits.payload_bytes} bytes", param="file")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            return {name: torch.from_numpy(_numbers(name, stored[name])) for name in stored.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError, TypeError, NotImplementedError,
            zipfile.LargeZipFile, RuntimeError) as error:
        raise InvalidPayload(f"malformed npz file: {error}", param="file") from error


def _numbers(name: str, array: Any) -> Any:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise InvalidPayload(f"the array {name[:80]!r} holds no numbers", param="file")
    wide = np.float64 if array.dtype.kind == "f" and array.dtype.itemsize == 8 else np.float32
    return np.ascontiguousarray(array, dtype=wide if array.dtype.kind == "f" else np.int64)
