"""Artifacts, presets, default spec and aliases over HTTP."""

import json
from typing import Any

import httpx
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load, save

from steering.artifacts.payload import Payload
from steering.language.spec import Spec
from tests.server.conftest import chat
from vectors.artifact import Metadata
from vectors.formats import get_format
from vectors.library import Library

META = {"name": "calm", "kind": "vector", "op": "add", "site": "resid_post", "tags": ["mood"],
        "description": "Keeps calm."}
VECTOR = [0.5, -1.0, 0.0, 2.0, 0.25, 1.0, -3.0, 1.5]


async def create(client: httpx.AsyncClient, **meta: Any) -> dict[str, Any]:
    answer = await client.post("/v1/artifacts", json={"metadata": META | meta, "tensors": {"2": {"vector": VECTOR}}})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_create_show_use(client: httpx.AsyncClient) -> None:
    made = await create(client)
    assert (made["ref"], made["version"], made["stored_layers"], made["d_model"]) == ("calm@1", 1, [2], 8)
    assert (await client.get("/v1/artifacts/calm")).json() == made
    assert (await create(client))["ref"] == "calm@1", "the same again is the same version"
    answer = await client.post("/v1/chat/completions", json=chat(steering={"interventions": [{"artifact": "calm"}]}))
    assert answer.json()["steering"]["applied"][0]["artifact"] == "calm@1"


async def test_list_filter_search_page(client: httpx.AsyncClient) -> None:
    for name in ("alpha", "beta", "gamma"):
        await create(client, name=name, tags=["greek"] if name != "beta" else [], description=f"is {name}")
    listed = (await client.get("/v1/artifacts")).json()
    assert [item["name"] for item in listed["data"]] == ["alpha", "beta", "gamma"] and listed["cursor"] is None
    for query, names in (({"tag": "greek"}, ["alpha", "gamma"]), ({"q": "is b"}, ["beta"]), ({"kind": "probe"}, []),
                         ({"order": "-name"}, ["gamma", "beta", "alpha"]), ({"op": "add", "site": "resid_post"},
                                                                            ["alpha", "beta", "gamma"])):
        answer = await client.get("/v1/artifacts", params=query)
        assert [item["name"] for item in answer.json()["data"]] == names, query
    seen, cursor = [], None
    while True:
        page = (await client.get("/v1/artifacts", params={"limit": 2} | ({"cursor": cursor} if cursor else {}))).json()
        seen += [item["name"] for item in page["data"]]
        cursor = page["cursor"]
        if cursor is None:
            break
    assert seen == ["alpha", "beta", "gamma"]


async def test_versions_and_aliases(client: httpx.AsyncClient) -> None:
    await create(client)
    assert (await create(client, description="Keeps very calm."))["version"] == 2
    versions = (await client.get("/v1/artifacts/calm/versions")).json()["data"]
    assert [v["version"] for v in versions] == [2, 1]
    moved = await client.put("/v1/artifacts/calm/aliases/production", json={"version": 1})
    assert moved.json()["aliases"] == ["production"]
    assert (await client.get("/v1/artifacts/calm")).json()["version"] == 1
    assert (await client.delete("/v1/artifacts/calm/aliases/production")).status_code == 204
    assert (await client.get("/v1/artifacts/calm")).json()["version"] == 2


async def test_patch_and_delete(client: httpx.AsyncClient) -> None:
    made = await create(client)
    patched = (await client.patch("/v1/artifacts/calm@1", json={"description": "New.", "card": {"score": 1}})).json()
    assert patched == made | {"description": "New.", "card": {"score": 1}}
    assert (await client.delete("/v1/artifacts/calm")).json() == {"deleted": ["calm@1"]}
    assert (await client.get("/v1/artifacts/calm")).status_code == 404


@pytest.mark.parametrize("form", [True, False])
async def test_download_and_import_again(client: httpx.AsyncClient, form: bool) -> None:
    made = await create(client)
    for kind in ("safetensors", "gguf"):
        file = await client.get("/v1/artifacts/calm/download", params={"format": kind})
        assert file.status_code == 200
        assert file.headers["content-disposition"] == f'attachment; filename="calm-1.{kind}"'
        fields = json.dumps({"name": f"copy-{kind}"})
        if form:
            answer = await client.post("/v1/artifacts/import", files={"file": ("a", file.content)},
                                       data={"metadata": fields})
        else:
            answer = await client.post("/v1/artifacts/import", params={"metadata": fields}, content=file.content,
                                       headers={"Content-Type": "application/octet-stream"})
        assert answer.status_code == 201, answer.text
        assert answer.json()["digest"] == made["digest"] and answer.json()["description"] == "Keeps calm."


async def test_downloads_are_what_other_readers_read(client: httpx.AsyncClient, tmp_path: Any) -> None:
    await create(client)
    data = (await client.get("/v1/artifacts/calm/download")).content
    assert torch.equal(load(data)["2.vector"], torch.tensor(VECTOR))
    (tmp_path / "v.gguf").write_bytes((await client.get("/v1/artifacts/calm/download?format=gguf")).content)
    [tensor] = GGUFReader(tmp_path / "v.gguf").tensors
    assert tensor.name == "direction.2" and tensor.data.tolist() == VECTOR


async def test_files_of_other_makers(client: httpx.AsyncClient) -> None:
    data = save({"1.vector": torch.ones(8), "3.vector": torch.ones(8)})
    answer = await client.post("/v1/artifacts/import", files={"file": data}, data={"metadata": json.dumps(META)})
    assert answer.json()["stored_layers"] == [1, 3]


async def test_presets(client: httpx.AsyncClient, library: Library) -> None:
    await create(client)
    body = {"name": "soft", "spec": {"interventions": [{"artifact": "calm", "strength": 0.5}]}, "description": "d"}
    made = (await client.post("/v1/presets", json=body)).json()
    assert (made["ref"], made["model"]) == ("soft@1", "tiny:soft")
    assert (await client.get("/v1/presets/soft")).json() == made
    assert [p["name"] for p in (await client.get("/v1/presets", params={"q": "sof"})).json()["data"]] == ["soft"]
    assert len((await client.get("/v1/presets/soft/versions")).json()["data"]) == 1
    answer = await client.post("/v1/chat/completions", json=chat() | {"model": "tiny:soft"})
    [applied] = answer.json()["steering"]["applied"]
    assert applied["strength"]["value"] == 0.5 and applied["source"] == "model"
    assert (await client.put("/v1/presets/soft/aliases/live", json={"version": 1})).json()["aliases"] == ["live"]
    assert (await client.delete("/v1/presets/soft")).status_code == 409
    assert (await client.delete("/v1/presets/soft/aliases/live")).status_code == 204
    assert (await client.delete("/v1/presets/soft")).json() == {"deleted": ["soft@1"]}


async def test_default_spec(client: httpx.AsyncClient) -> None:
    await create(client)
    assert (await client.get("/v1/admin/default-spec")).json() == {"spec": None, "problem": None, "turned": None}
    put = await client.put("/v1/admin/default-spec", json={"interventions": [{"artifact": "calm"}]})
    assert put.status_code == 200
    assert (await client.get("/v1/admin/default-spec")).json() == put.json()
    assert (await client.delete("/v1/artifacts/calm")).status_code == 409
    cleared = (await client.delete("/v1/admin/default-spec")).json()
    assert cleared.pop("turned")["by"] == "owner" and cleared == {"spec": None, "problem": None}


def foreign(library: Library, name: str, width: int = 8, **fields: Any) -> str:
    return library.create(Metadata(name=name, kind="vector", op="add", site="resid_post", **fields),
                          Payload.build("vector", {2: {"vector": torch.ones(width)}})).ref


async def test_only_presets_of_this_model_are_models(client: httpx.AsyncClient, library: Library) -> None:
    """A library may serve several models; what another one has is no model name here."""
    foreign(library, "here")
    foreign(library, "own", fingerprint="f" * 64)
    foreign(library, "elsewhere", fingerprint="e" * 64)
    foreign(library, "wide", width=16)
    foreign(library, "gone")
    uses: dict[str, list[dict[str, Any]]] = {
        "a": [{"artifact": "here"}], "b": [{"artifact": "own"}], "c": [{"artifact": "here"}, {"artifact": "elsewhere"}],
        "d": [{"artifact": "wide"}], "e": [{"artifact": "elsewhere", "override": ["model"]}],
        "f": [{"artifact": "gone"}], "g": [{"op": "add", "layers": [2], "inline": {"vector": [1.0] * 8}}],
        "h": [{"op": "add", "layers": [2], "inline": {"vector": [1.0] * 16}}],
        "i": [{"artifact": "here", "gate": {"probe": "elsewhere", "when": "prompt", "threshold": 0.0}}],
        "j": [{"artifact": "here", "gate": {"probe": "elsewhere", "when": "prompt", "threshold": 0.0,
                                            "override": ["model"]}}]}
    for name, interventions in uses.items():
        library.presets.create(name, Spec.model_validate({"interventions": interventions}))
    library.delete("gone", force=True)
    listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    assert listed == ["tiny", "tiny:a", "tiny:b", "tiny:e", "tiny:g", "tiny:j"]
    for name in uses:
        shown = await client.get(f"/v1/models/tiny:{name}")
        assert shown.status_code == (200 if f"tiny:{name}" in listed else 404), name
    # Presets themselves are all there, for the servers of the other models.
    assert len((await client.get("/v1/presets")).json()["data"]) == len(uses)


@pytest.mark.parametrize("fields", [{}, {"model_id": "tiny"}, {"fingerprint": "f" * 64}])
async def test_numbers_of_another_width_are_refused_at_import(client: httpx.AsyncClient, library: Library,
                                                              fields: dict[str, Any]) -> None:
    metadata = {"name": "wide", "kind": "vector", "op": "add", "site": "resid_post", **fields}
    payload = Payload.build("vector", {2: {"vector": torch.ones(16)}})
    created = await client.post("/v1/artifacts", json={"metadata": metadata,
                                                       "tensors": {"2": {"vector": [1.0] * 16}}})
    data = get_format("gguf").write(Metadata.model_validate(metadata), payload)
    imported = await client.post("/v1/artifacts/import", params={"metadata": json.dumps({"name": "wide", **fields})},
                                 content=data, headers={"Content-Type": "application/octet-stream"})
    for answer in (created, imported):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (409, "artifact_mismatch")
        assert "16 wide" in error["message"] and "is 8 wide" in error["message"]
    assert library.list().items == []


async def test_numbers_that_say_they_are_another_models_are_kept_for_it_and_refused_by_width_first(
        client: httpx.AsyncClient, library: Library) -> None:
    """Whatever else is wrong with its use: layers that this model lacks, a foreign fingerprint."""
    stored = await client.post("/v1/artifacts", json={
        "metadata": {"name": "wide", "kind": "vector", "op": "add", "site": "resid_post", "model_id": "large",
                     "fingerprint": "e" * 64},
        "tensors": {str(n): {"vector": [1.0] * 16} for n in (2, 30)}})
    assert stored.status_code == 201
    for use in ({"artifact": "wide"}, {"artifact": "wide", "override": ["model"]}, {"artifact": "wide", "layers": [30]},
                {"artifact": "wide", "op": "ablate"}):
        answer = await client.post("/v1/chat/completions", json={
            "model": "tiny", "messages": [{"role": "user", "content": "x"}], "steering": {"interventions": [use]}})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (409, "artifact_mismatch")
        if "op" not in use:
            assert "on large for a width of 16" in error["message"] and "is 8 wide" in error["message"]
            assert "override" not in error["message"] and error["param"] == "steering.interventions[0].artifact"
