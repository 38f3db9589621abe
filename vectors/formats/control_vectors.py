"""Control vectors of llama.cpp and repeng: GGUF files of the architecture `controlvector`.

Layer numbering: llama.cpp adds the tensor `direction.N` to the output of block N, counted from 0, and repeng names it
after the block whose output it read, so `direction.N` is resid_post[N]. llama.cpp refuses files with `direction.0`;
some makers write it all the same and mean block 0, and so it is read here. Its own cvector-generator names what it read
at the output of block N - 1 `direction.N`; llama.cpp adds that to the output of block N all the same, and so do we.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from pydantic_core import from_json

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidPayload
from vectors.artifact import InvalidMetadata, Limits, Metadata
from vectors.formats.base import without_noise
from vectors.scratch import ScratchFolder
from vectors.storage_errors import storing

ARCHITECTURE = "controlvector"
METADATA_KEY = "trimtab.metadata"
# Reads of one number, string or array element that a header may cost; control vectors need a few per layer.
MAX_READS = 16_384
MAX_NOTES = 256
# What the reader of the gguf package raises on files that are not as they should be.
MALFORMED = (ValueError, KeyError, IndexError, TypeError, OverflowError, ArithmeticError, RecursionError, MemoryError)

_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")


class BoundedReader(GGUFReader):
    """The reader of the gguf package, for files of strangers: no read past the end, and only so many of them.

    The package's own reader returns fewer bytes without an error where a file ends too early, and believes any array
    length.
    """

    reads = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self.reads += 1
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if self.reads > MAX_READS or end > len(self.data):
            raise ValueError("the header is too long" if self.reads > MAX_READS else "the file is cut off")
        return super()._get(int(offset), dtype, count, override_order)


def read(data: bytes, limits: Limits) -> tuple[dict[str, Any], Payload]:
    """Metadata as the file tells it, and the numbers.

    Raises:
        InvalidPayload, StorageUnavailable.
    """
    # The reader maps an open file as well as a path; what it gives are views, which _directions copies.
    with _open_file(data) as file:
        try:
            with np.errstate(all="raise"):
                reader = BoundedReader(cast(Any, file))
                notes = _notes(reader)
                directions = _directions(reader, limits)
        except MALFORMED as error:
            raise InvalidPayload(f"malformed GGUF file: {error}"[:300], param="file") from error
    kept, left_out = without_noise(directions)
    return _recorded(notes, left_out), Payload.build("vector", {n: {"vector": vector} for n, vector in kept.items()})


def write(metadata: Metadata, payload: Payload) -> bytes:
    """The file of a vector that is added at resid_post."""
    with ScratchFolder() as folder:
        path = folder / "vector.gguf"
        writer = GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", metadata.model_id or "unknown")
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(payload.layers))
        writer.add_string(METADATA_KEY, metadata.document())
        for layer, tensors in payload.layers.items():
            writer.add_tensor(f"direction.{layer}", tensors["vector"].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


@contextmanager
def _open_file(data: bytes) -> Iterator[IO[bytes]]:
    """Raises StorageUnavailable."""
    with tempfile.TemporaryFile() as file:
        with storing("the file cannot be laid down to be read"):
            file.write(data)
            file.flush()
        yield file


def _notes(reader: GGUFReader) -> dict[str, Any]:
    """Keys of the header with a single value."""
    architecture = reader.get_field("general.architecture")
    if architecture is None or architecture.types != [GGUFValueType.STRING] or \
            architecture.contents() != ARCHITECTURE:
        raise ValueError(f"general.architecture is not {ARCHITECTURE}; this is no control vector")
    notes = {key: field.contents() for key, field in reader.fields.items()
             if field.types and field.types[0] != GGUFValueType.ARRAY}
    return dict(list(notes.items())[:MAX_NOTES])


def _directions(reader: GGUFReader, limits: Limits) -> dict[int, torch.Tensor]:
    if len(reader.tensors) > limits.layers:
        raise ValueError(f"{len(reader.tensors)} tensors are more than {limits.layers} layers")
    directions: dict[int, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = _DIRECTION.fullmatch(tensor.name)
        if name is None:
            raise ValueError(f"tensor {tensor.name[:80]!r} is not named direction.LAYER")
        if tensor.tensor_type not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16) or tensor.data.ndim != 1:
            raise ValueError(f"tensor {tensor.name} is not one row of F32 or F16")
        directions[int(name[1])] = torch.from_numpy(tensor.data.astype(np.float32))
    return directions


def _recorded(notes: Mapping[str, Any], left_out: list[int]) -> dict[str, Any]:
    """Metadata as the file tells it: all of it in files of our own, else what its notes allow."""
    own = notes.get(METADATA_KEY)
    if own is None:
        prefix = f"{ARCHITECTURE}."
        found = {key.removeprefix(prefix): value for key, value in notes.items() if key.startswith(prefix)}
        return {"kind": "vector", "op": "add", "site": "resid_post",
                "provenance": {"method": str(found.get("method", "unknown")), "source_format": "gguf", "gguf": found,
                               **({"left_out_layers": left_out} if left_out else {})}}
    try:
        recorded = from_json(own, allow_inf_nan=False)
    except (ValueError, TypeError) as error:
        raise InvalidMetadata(f"{METADATA_KEY} is no JSON: {error}", param="file") from error
    if not isinstance(recorded, dict):
        raise InvalidMetadata(f"{METADATA_KEY} is no JSON object", param="file")
    return recorded
