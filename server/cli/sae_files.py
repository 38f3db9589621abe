"""What stands beside the file of an SAE on a disk: its folder, its configuration, and the names of the folders."""

import json
from pathlib import Path
from typing import Any

from steering.language.errors import InvalidRequest

WEIGHTS = ("sae_weights.safetensors", "params.safetensors", "params.npz", "sae.safetensors", "ae.pt",
           "checkpoints/final.safetensors", "final.safetensors")
CONFIGS = ("cfg.json", "config.json", "hyperparams.json")
MOST_BYTES = 2**20
# As many folders above a file as published SAEs have between it and what names the model's place.
FOLDERS = 4


def with_beside(path: Path, fields: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file to read, and the fields of an import joined with what stands beside it; fields that are given win.

    Raises:
        InvalidRequest: a folder without such a file, or a configuration that is no JSON object.
    """
    if path.is_dir():
        found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if found is None:
            raise InvalidRequest(f"{path} has no file of an SAE", param="path", fix=f"Looked for {', '.join(WEIGHTS)}.")
        path = found
    if not _may_be_one(path):
        return path, fields
    # Loads torch, as what is imported from there does.
    from vectors.formats.dictionaries.hooks import place_in_path

    said = dict(fields.get("sae") or {})
    config = _config(path)
    if config and "config" not in said:
        said["config"] = config
    joined = {**fields, **({"sae": said} if said else {})}
    if not _names_place(said.get("config", {})):
        site, layer = place_in_path(path.resolve().parts[-FOLDERS - 1:])
        told = {"site": site, "layers": None if layer is None else [layer]}
        joined = {name: value for name, value in told.items() if value is not None} | joined
    return path, joined


def _may_be_one(path: Path) -> bool:
    """Whether the file is an SAE of another program. Pickles are told by their names alone; what they hold is seen when
    they are read."""
    if path.suffix == ".npz":
        return True
    if path.suffix in (".pt", ".pth"):
        return path.name == "ae.pt" or "sae" in path.name.lower()
    if path.suffix != ".safetensors":
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = file.read(length) if length <= MOST_BYTES else b""
    try:
        names = json.loads(head)
    except ValueError:
        return False
    return isinstance(names, dict) and bool({"W_enc", "w_enc", "encoder.weight", "encoder_linear.weight"} & set(names))


def _config(path: Path) -> dict[str, Any]:
    for folder in (path.parent, path.parent.parent):
        for name in CONFIGS:
            file = folder / name
            if not file.is_file() or file.stat().st_size > MOST_BYTES:
                continue
            try:
                found = json.loads(file.read_bytes())
            except ValueError as error:
                raise InvalidRequest(f"{file} is no JSON: {error}", param="path") from None
            if not isinstance(found, dict):
                raise InvalidRequest(f"{file} is no JSON object", param="path")
            return found
        if path.parent.name != "checkpoints":
            break
    return {}


def _names_place(config: dict[str, Any]) -> bool:
    """Whether the configuration itself says where the SAE is of, which then counts."""
    about = {**config, **(config.get("metadata") or config.get("meta") or {})}
    trainer = config.get("trainer")
    return bool({"hook_name", "hook_point", "hook_point_in", "hf_hook_point_in"} & set(about)) or (
        isinstance(trainer, dict) and "submodule_name" in trainer)
