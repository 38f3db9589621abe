"""Requests to the library: artifacts and presets."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

from trimtab_client.flow import Call
from trimtab_client.models import Artifact, Page, Preset
from trimtab_client.reading import content_of, deleted_of, nothing, reader

Order = Literal["name", "-name", "created", "-created"]


def list_artifacts(*, q: str | None = None, kind: str | None = None, op: str | None = None, site: str | None = None,
                   tag: str | None = None, model_id: str | None = None, all: bool = False, order: Order = "name",
                   limit: int = 50, cursor: str | None = None) -> Call[Page[Artifact]]:
    """One entry per name: the version that the bare name means. q: searched in name, description and tags. all: also
    those that belong to other models than the one that is served."""
    return Call("GET", "/v1/artifacts", reader(Page[Artifact]),
                params={"q": q, "kind": kind, "op": op, "site": site, "tag": tag, "model_id": model_id,
                        "all": all or None, "order": order, "limit": limit, "cursor": cursor})


def get_artifact(ref: str) -> Call[Artifact]:
    """ref: "name", "name@3" or "name@alias"."""
    return Call("GET", f"/v1/artifacts/{_segment(ref)}", reader(Artifact))


def artifact_versions(name: str) -> Call[Page[Artifact]]:
    """All versions, newest first."""
    return Call("GET", f"/v1/artifacts/{_segment(name)}/versions", reader(Page[Artifact]))


def create_artifact(metadata: Mapping[str, Any], tensors: Mapping[int, Mapping[str, Any]]) -> Call[Artifact]:
    """Store numbers. tensors: layer -> tensor name -> nested lists of numbers."""
    return Call("POST", "/v1/artifacts", reader(Artifact), json={
        "metadata": dict(metadata), "tensors": {str(layer): dict(named) for layer, named in tensors.items()}})


def import_artifact(data: bytes, metadata: Mapping[str, Any] | None = None) -> Call[Artifact]:
    """Take in a safetensors, GGUF or npz file. metadata: fields that win over those in the file; of an SAE of another
    program the JSON beside it and its conventions under `sae`."""
    return Call("POST", "/v1/artifacts/import", reader(Artifact), content=data,
                params={"metadata": None if metadata is None else json.dumps(dict(metadata))},
                headers={"Content-Type": "application/octet-stream"})


def download_artifact(ref: str, *, format: Literal["safetensors", "gguf"] = "safetensors",
                      layers: Sequence[int] | None = None) -> Call[bytes]:
    """The file. layers: only these."""
    return Call("GET", f"/v1/artifacts/{_segment(ref)}/download", content_of,
                params={"format": format, "layers": None if layers is None else ",".join(map(str, layers))})


def patch_artifact(ref: str, *, description: str | None = None, tags: Sequence[str] | None = None,
                   card: Mapping[str, Any] | None = None) -> Call[Artifact]:
    """Change what describes one version; None leaves a field as it is."""
    given = {"description": description, "tags": None if tags is None else list(tags),
             "card": None if card is None else dict(card)}
    return Call("PATCH", f"/v1/artifacts/{_segment(ref)}", reader(Artifact),
                json={name: value for name, value in given.items() if value is not None})


def delete_artifact(ref: str, *, force: bool = False) -> Call[list[str]]:
    """Delete one version, or with a bare name all; returns their references. force: also where they are in use."""
    return Call("DELETE", f"/v1/artifacts/{_segment(ref)}", deleted_of, params={"force": str(force).lower()})


def set_alias(name: str, alias: str, version: int) -> Call[Artifact]:
    """Point an alias of an artifact at a version."""
    return Call("PUT", f"/v1/artifacts/{_segment(name)}/aliases/{_segment(alias)}", reader(Artifact),
                json={"version": version})


def remove_alias(name: str, alias: str) -> Call[None]:
    return Call("DELETE", f"/v1/artifacts/{_segment(name)}/aliases/{_segment(alias)}", nothing)


def list_presets(*, q: str | None = None, all: bool = False, order: Order = "name", limit: int = 50,
                 cursor: str | None = None) -> Call[Page[Preset]]:
    """One entry per name: the version that the bare name means. all: also those that belong to other models."""
    return Call("GET", "/v1/presets", reader(Page[Preset]),
                params={"q": q, "all": all or None, "order": order, "limit": limit, "cursor": cursor})


def get_preset(ref: str) -> Call[Preset]:
    return Call("GET", f"/v1/presets/{_segment(ref)}", reader(Preset))


def preset_versions(name: str) -> Call[Page[Preset]]:
    """All versions, newest first."""
    return Call("GET", f"/v1/presets/{_segment(name)}/versions", reader(Page[Preset]))


def create_preset(name: str, spec: Mapping[str, Any], description: str = "") -> Call[Preset]:
    """Store a spec (`{"interventions": [...]}`) as a new version."""
    return Call("POST", "/v1/presets", reader(Preset),
                json={"name": name, "spec": dict(spec), "description": description})


def delete_preset(ref: str, *, force: bool = False) -> Call[list[str]]:
    """Delete one version, or with a bare name all; returns their references."""
    return Call("DELETE", f"/v1/presets/{_segment(ref)}", deleted_of, params={"force": str(force).lower()})


def set_preset_alias(name: str, alias: str, version: int) -> Call[Preset]:
    """Point an alias of a preset at a version."""
    return Call("PUT", f"/v1/presets/{_segment(name)}/aliases/{_segment(alias)}", reader(Preset),
                json={"version": version})


def remove_preset_alias(name: str, alias: str) -> Call[None]:
    return Call("DELETE", f"/v1/presets/{_segment(name)}/aliases/{_segment(alias)}", nothing)


def _segment(text: str) -> str:
    """One segment of a path, whatever the text: a slash in a name must not become another path."""
    return quote(text, safe="@")
