"""The artifacts and presets that `trimtab serve smollm2` publishes, as files in lab/artifacts/smollm2."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab_client import Client, NotFound

from lab.paths import LAB_DIR
from lab.real import page
from lab.real.claims import CLAIMS, Claim
from vectors.artifact import Limits
from vectors.formats import get_format

FOLDER = LAB_DIR / "artifacts" / "smollm2"


def fetch(client: Client, claim: Claim, result: page.Document) -> None:
    """The file of one claim, with the layers that it acts on."""
    path = FOLDER / f"{claim.name}.safetensors"
    path.unlink(missing_ok=True)
    if "failed" not in result:
        artifact = client.get_artifact(claim.name)
        some = isinstance(artifact.layers, list) and artifact.kind in ("vector", "manifold")
        layers = artifact.layers if some else None
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.download_artifact(claim.name, layers=layers))


def bring(client: Client, names: Sequence[str]) -> None:
    """Upload bundled artifacts that a library lacks, where a run that stopped had made them on another server."""
    for name in names:
        try:
            client.get_artifact(name)
        except NotFound:
            client.import_artifact((FOLDER / f"{name}.safetensors").read_bytes())


def finish(folder: Path = FOLDER) -> None:
    """Put on each card what the page says of it. What does not work is not published."""
    own = get_format("safetensors")
    for claim in CLAIMS:
        path, result = folder / f"{claim.name}.safetensors", page.stored(claim)
        if not path.exists() or result is None:
            continue
        found = page.findings(result)
        if all(one.verdict.startswith(page.NOTHING) for one in found):
            path.unlink()
            continue
        metadata, payload = own.read(path.read_bytes(), {}, Limits())
        card = {**(metadata.card or {}), "for": claim.description, "real_model": [asdict(one) for one in found]}
        if claim.read:
            card["read"] = claim.read
        path.write_bytes(own.write(metadata.model_copy(update={"card": card}), payload))


def write_presets(folder: Path = FOLDER) -> None:
    """Of the claims whose artifacts are there."""
    entries = []
    own = get_format("safetensors")
    for claim in CLAIMS:
        for name, said in claim.presets.items():
            artifact = str(said.get("artifact", claim.name))
            if not all((folder / f"{needed}.safetensors").exists() for needed in (artifact, claim.name)):
                continue
            intervention: dict[str, Any] = {"artifact": f"{artifact}@production"}
            if "sign" in said:
                metadata, _ = own.read((folder / f"{artifact}.safetensors").read_bytes(), {}, Limits())
                intervention["strength"] = {"value": said["sign"] * metadata.strength.value,
                                            "unit": metadata.strength.unit}
            if "gate" in said:
                intervention["gate"] = {"probe": f"{said['gate']}@production"}
            entries.append({"name": name, "description": said.get("description", claim.description),
                            "spec": {"interventions": [intervention]}})
    (folder / "presets.json").write_text(json.dumps(entries, indent=2) + "\n")
