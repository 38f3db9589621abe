"""A file of captured activations that another server wrote, as one of this server's own.

Nothing of it is believed but what can be seen: sizes and names are checked, and whose weights the numbers are of is
what the file says. That is no more than what a request may say that gives numbers itself, so a patch from it needs the
same role.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from server.activations.rows import POSITIONS
from server.activations.store import Activations, StoredActivations
from server.activations.table import DTYPES, Column
from steering.language.errors import InvalidPayload
from steering.language.vocabulary import SITES, Site

NAMED = re.compile(rf"({'|'.join(SITES)})\.(\d{{1,5}})")
MOST_TENSORS, MOST_TOLD = 4096, 64 * 1024
FIX = "Send the file of GET /v1/activations/{id}/content as it is."


def taken(data: bytes, id: str, store: StoredActivations, tenant: str) -> Activations:
    """Keep the file under the id.

    Raises:
        InvalidPayload: it is not such a file. FilesFull, StorageUnavailable.
    """
    told, tensors = _read(data)
    activations = {name: tensor for name, tensor in tensors.items() if NAMED.fullmatch(name)}
    described = _described(id, told, tensors, activations, store, tenant)
    columns = {name: Column(tensor.dtype, len(tensor), None if tensor.ndim == 1 else tensor.shape[1])
               for name, tensor in tensors.items()}
    described.bytes = store.check_room(columns, told)
    with store.writing(described, columns, told) as table:
        for name, tensor in tensors.items():
            table.put(name, 0, tensor)
    return described


def _read(data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(len(data) - 8, 4 * 2**20):
        raise InvalidPayload("this is no safetensors file", param="file", fix=FIX)
    try:
        header = json.loads(data[8:8 + length])
        loaded = load(data)
        # In the order of the file, which is that of the file that is written of it.
        tensors = {name: loaded[name] for name in header if name != "__metadata__"}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise InvalidPayload(f"malformed safetensors file: {error}"[:400], param="file", fix=FIX) from error
    told = header.get("__metadata__", {})
    if not all(isinstance(told.get(name), str) for name in ("model", "fingerprint", "pool", POSITIONS)):
        raise InvalidPayload("the file does not say of which model it is and what was captured", param="file", fix=FIX)
    kept = {name: told[name] for name in ("model", "fingerprint", "pool", POSITIONS)}
    kept["steering"] = told["steering"] if isinstance(told.get("steering"), str) else "{}"
    if sum(map(len, kept.values())) > MOST_TOLD or max(len(kept["model"]), len(kept["fingerprint"])) > 256:
        raise InvalidPayload("what the file says of itself is too long", param="file", fix=FIX)
    return kept, tensors


def _described(id: str, told: Mapping[str, str], tensors: Mapping[str, Tensor], activations: Mapping[str, Tensor],
               store: StoredActivations, tenant: str) -> Activations:
    pool: Any = told["pool"]
    known: Any = {dtype: name for name, dtype in DTYPES.items()}
    indices = {"none": ("text", "position", "token"), "mean": ("text", "count")}.get(pool)
    if indices is None or set(tensors) != {*indices, *activations} or not activations:
        raise InvalidPayload("the file has other tensors than captured activations have", param="file", fix=FIX)
    rows = len(tensors["text"]) if tensors["text"].ndim == 1 else 0
    kinds = {tensor.dtype for tensor in activations.values()}
    if (not rows or len(tensors) > MOST_TENSORS or len(kinds) > 1 or known.get(next(iter(kinds)), "int32") == "int32"
            or any(tensor.ndim != 2 or len(tensor) != rows or not tensor.shape[1] for tensor in activations.values())
            or any(tensors[name].dtype != torch.int32 or tensors[name].shape != (rows,) or int(tensors[name].min()) < 0
                   for name in indices)
            or not bool((tensors["text"].diff() >= 0).all())):
        raise InvalidPayload("the tensors do not have the shapes and types of captured activations", param="file",
                             fix=FIX)
    sites: dict[Site, list[int]] = {}
    for name in sorted(activations):
        site, _, layer = name.partition(".")
        sites.setdefault(site, []).append(int(layer))  # type: ignore[arg-type]
    created, expires = store.expiry(None)
    return Activations(
        id=id, created_at=created, expires_at=expires, model=told["model"], fingerprint=told["fingerprint"],
        texts=len(tensors["text"].unique()), tokens=rows if pool == "none" else int(tensors["count"].sum()), rows=rows,
        sites={site: sorted(layers) for site, layers in sites.items()}, pool=pool, dtype=known[next(iter(kinds))],
        bytes=0,
        applied=[] if told["steering"] == "{}" else ["what the other server was asked for"], tenant=tenant)
