"""Adapters over HTTP, on an engine that has none and on one that records what it is asked."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from server.engines.adapters import Adapter, Adapters
from server.settings import Settings
from tests.server.conftest import MODEL
from tests.server.scripted import ScriptedEngine


class Adapting(ScriptedEngine):
    """It has adapters, and none of them does anything."""

    def on(self, adapter: Adapter) -> "Adapting":
        self.served_on.append(adapter.name)
        return self

    async def load_adapter(self, name: str, folder: Path) -> Adapter:
        self.served_on.append(f"load {name} {folder.name}")
        adapter = Adapter(name, "0" * 64, len(self.served_on), folder, 7)
        self.adapters.add(adapter)  # type: ignore[union-attr]
        return adapter

    async def unload_adapter(self, name: str) -> None:
        self.adapters.remove(name)  # type: ignore[union-attr]


@pytest.fixture
def engine(vocabulary: Any) -> Adapting:
    made = Adapting(vocabulary)
    made.adapters, made.served_on = Adapters(), []  # type: ignore[attr-defined]
    return made


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "adapters" / "calm").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "adapters" / "link").symlink_to(tmp_path / "outside")
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", engine="vllm",
                    vllm_adapter_dir=tmp_path / "adapters")


async def load(client: httpx.AsyncClient, name: str, path: str, **fields: Any) -> httpx.Response:
    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


@pytest.mark.parametrize("path", ["..", ".", "../outside", "/etc", "link", "calm/../../outside", "\0"])
async def test_nothing_outside_of_the_folder_is_read(client: httpx.AsyncClient, engine: Any, path: str) -> None:
    answer = await load(client, "one", path)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_path"
    assert engine.served_on == []


@pytest.mark.parametrize(("name", "status"), [(MODEL, 409), ("a:b", 400), ("", 400), ("../x", 400), ("org/one", 200)])
async def test_names(client: httpx.AsyncClient, name: str, status: int) -> None:
    assert (await load(client, name, "calm")).status_code == status


async def test_an_adapter_is_a_model(client: httpx.AsyncClient, engine: Any, app: FastAPI) -> None:
    absolute = str(app.state.server.settings.vllm_adapter_dir / "calm")
    assert (await load(client, "one", absolute)).text == "Success: LoRA adapter 'one' added successfully."
    assert (await load(client, "one", "calm")).status_code == 409
    assert (await load(client, "one", "calm", load_inplace=True)).status_code == 200
    listed = (await client.get("/v1/models")).json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [(MODEL, None), ("one", MODEL)]
    assert (await client.post("/v1/presets", json={"name": "quiet", "spec": {"interventions": [
        {"op": "add", "inline": {"vector": {"1": [0.5] * engine.facts.d_model}}}]}})).status_code == 201
    engine.served_on.clear()
    for model, applied in (("one", 0), ("one:quiet", 1), (MODEL, 0), (f"{MODEL}:quiet", 1)):
        answer = await client.post("/v1/completions", json={"model": model, "prompt": "hi", "max_tokens": 2})
        assert (answer.status_code, answer.json()["model"]) == (200, model)
        assert len(answer.json()["steering"]["applied"]) == applied
    assert engine.served_on == ["one", "one"]
    assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "one"})).status_code == 200
    for model in ("one", "one:quiet", "one:", f"{MODEL}:", ":quiet", "two"):
        answer = await client.post("/v1/completions", json={"model": model, "prompt": "hi", "max_tokens": 2})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model"), model


async def test_an_artifact_is_made_on_no_preset(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"/v1/extract/mean_difference?model={MODEL}:quiet", json={"name": "a", "pairs": []})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "model"


async def test_a_calibration_refuses_an_adapter_and_says_what_to_do(client: httpx.AsyncClient) -> None:
    await load(client, "one", "calm")
    body = {"prompts": [f"a day {n}" for n in range(20)]}
    refused = (await client.post("/v1/artifacts/mine/calibrate?model=one", json=body)).json()["error"]
    assert (refused["code"], refused["param"]) == ("invalid_request", "model")
    assert "/v1/artifacts/mine/tune?model=" in refused["message"]
    # The control: named or not, the model itself is no reason to refuse.
    for query in ("", f"?model={MODEL}"):
        answer = await client.post(f"/v1/artifacts/mine/calibrate{query}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


class TestWithoutAdapters:
    @pytest.fixture
    def engine(self, vocabulary: Any) -> ScriptedEngine:
        return ScriptedEngine(vocabulary)

    async def test_both_requests_are_refused_by_name(self, client: httpx.AsyncClient) -> None:
        for answer in (await load(client, "one", "calm"),
                       await client.post("/v1/unload_lora_adapter", json={"lora_name": "one"})):
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_parameter")


@pytest.mark.parametrize("fields", [
    {"engine": "transformers", "vllm_adapters": {"one": "x"}}, {"vllm_adapter_dir": "x"},
    {"engine": "vllm", "vllm_adapters": {"a:b": "x"}}, {"engine": "vllm", "vllm_adapters": {"own": "x"}}])
def test_settings(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="adapter"):
        Settings(**{"served_model_name": "own", **fields})
