"""`/v1/activations` over a scripted engine: what the file holds, what is refused, and what is left behind."""

import asyncio
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from safetensors import safe_open
from safetensors.torch import load, save

from server.activations.store import Activations, StoredActivations
from server.activations.table import Column, Table, size_of
from server.background.job import FINISHED
from server.errors import FilesFull
from server.settings import Settings
from steering.language.errors import NotFound
from tests.server.conftest import MODEL
from tests.server.scripted import LAYERS, WIDTH, ScriptedEngine
from tests.server.test_steering import store

TEXTS: list[list[int]] = [[40, 41, 42], [50], [60, 61, 62, 63, 64]]


def activation(token: int, layer: int) -> list[float]:
    return [float(torch.sin(torch.tensor(float(token)) * (k + 1) + layer)) for k in range(WIDTH)]


async def ended(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The job once it is over."""
    answer = await client.post("/v1/activations", json={
        "model": MODEL, "input": TEXTS, "sites": {"resid_post": [1, 3]}, **fields})
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    while job["status"] not in FINISHED:
        await asyncio.sleep(0.005)
        job = (await client.get(f"/v1/jobs/{job['id']}")).json()
    return job


async def captured(client: httpx.AsyncClient, **fields: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    job = await ended(client, **fields)
    assert job["status"] == "succeeded", job
    told = job["result"]
    assert (await client.get(f"/v1/activations/{told['id']}")).json() == told
    answer = await client.get(f"/v1/activations/{told['id']}/content")
    assert answer.status_code == 200 and len(answer.content) == told["bytes"]
    return told, load(answer.content)


async def test_every_row_is_of_the_token_that_it_names(client: httpx.AsyncClient) -> None:
    told, found = await captured(client)
    flat = [(text, position, token) for text, ids in enumerate(TEXTS) for position, token in enumerate(ids)]
    assert sorted(found) == ["position", "resid_post.1", "resid_post.3", "text", "token"]
    rows = zip(found["text"].tolist(), found["position"].tolist(), found["token"].tolist(), strict=True)
    assert list(rows) == flat and told["rows"] == told["tokens"] == len(flat) and told["texts"] == 3
    for layer in (1, 3):
        expected = torch.tensor([activation(token, layer) for _, _, token in flat])
        assert torch.allclose(found[f"resid_post.{layer}"], expected, atol=1e-6)


async def test_positions_means_and_smaller_numbers(client: httpx.AsyncClient) -> None:
    _, found = await captured(client, positions=[-1, 0], sites={"mlp_out": "all"})
    assert found["position"].tolist() == [2, 0, 0, 0, 4, 0] and found["token"].tolist() == [42, 40, 50, 50, 64, 60]
    assert sorted(name for name in found if "." in name) == [f"mlp_out.{n}" for n in range(LAYERS)]
    _, means = await captured(client, pool="mean", dtype="bfloat16")
    assert means["text"].tolist() == [0, 1, 2] and means["count"].tolist() == [3, 1, 5] and "token" not in means
    expected = torch.stack([torch.tensor([activation(token, 3) for token in ids]).mean(0) for ids in TEXTS])
    assert means["resid_post.3"].dtype == torch.bfloat16
    assert torch.allclose(means["resid_post.3"].float(), expected, atol=0.01)


async def test_texts_and_conversations_are_tokenized_as_requests_are(client: httpx.AsyncClient, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "hi"}]
    _, found = await captured(client, input=["hello", turns])
    ids = [tokenizer.encode("hello"),
           tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]]
    assert found["token"].tolist() == [*ids[0], *ids[1]]


async def test_what_steered_is_told_in_the_answer_and_in_the_file(client: httpx.AsyncClient, library: Any) -> None:
    store(library, "calm")
    spec = {"interventions": [{"artifact": "calm"}]}
    told, _ = await captured(client, steering=spec)
    assert told["applied"] == ["calm@1 (add)"] and told["disabled"] is None
    await client.put("/v1/admin/kill-switch", json={"on": True})
    told, _ = await captured(client, steering=spec)
    assert told["applied"] == [] and told["disabled"]


@pytest.mark.parametrize(("fields", "param"), [
    ({"input": [[40], []]}, "input"), ({"input": [[40], [10**6]]}, "input[1]"), ({"input": []}, "input"),
    ({"sites": {}}, "sites"), ({"sites": {"nowhere": [0]}}, "sites"),
    ({"sites": {"resid_post": [LAYERS]}}, "sites.resid_post"),
    ({"sites": {"router": "all"}}, "sites.router"), ({"positions": [3]}, "positions[0]"), ({"dtype": "int8"}, "dtype"),
    ({"pool": "max"}, "pool"), ({"model": "other"}, "model"), ({"expires_after_s": 0}, "expires_after_s"),
    ({"steering": {"interventions": [], "report": "summary"}}, "steering.report"),
])
async def test_what_does_not_fit_is_refused_before_a_job_begins(client: httpx.AsyncClient, fields: dict[str, Any],
                                                                 param: str) -> None:
    body = {"model": MODEL, "input": TEXTS, "sites": {"resid_post": [1]}, **fields}
    answer = await client.post("/v1/activations", json=body)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["param"].startswith(param), answer.text
    assert (await client.get("/v1/jobs")).json()["data"] == [] and (await client.get("/v1/activations")).json() == {
        "data": []}


async def test_they_are_listed_deleted_and_unknown_ones_are_not_found(client: httpx.AsyncClient, settings: Settings
                                                                      ) -> None:
    first, _ = await captured(client)
    second, _ = await captured(client, positions=[0])
    listed = (await client.get("/v1/activations")).json()["data"]
    assert {one["id"] for one in listed} == {first["id"], second["id"]}
    assert (await client.delete(f"/v1/activations/{first['id']}")).status_code == 204
    for unknown in (first["id"], "act-" + "0" * 24, "..%2f..%2fsecret", "act-x"):
        for path in ("", "/content"):
            assert (await client.get(f"/v1/activations/{unknown}{path}")).status_code == 404
    assert sorted(path.suffix for path in (settings.data_dir / "activations").iterdir()) == [".json", ".safetensors"]


async def test_a_part_of_the_file_can_be_had(client: httpx.AsyncClient) -> None:
    told, _ = await captured(client)
    path = f"/v1/activations/{told['id']}/content"
    whole = (await client.get(path)).content
    part = await client.get(path, headers={"Range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == whole[100:200]


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_a_job_that_does_not_end_well_leaves_nothing(client: httpx.AsyncClient, engine: ScriptedEngine,
                                                           settings: Settings, how: str) -> None:
    begun, capture_ = asyncio.Event(), engine.capture

    async def capture(requests: Any, program: Any = None) -> Any:
        if requests[0].token_ids not in TEXTS:
            # The estimate of the time that the job will take.
            return await capture_(requests, program)
        begun.set()
        if how == "fails":
            raise OSError("the device is gone")
        await asyncio.Event().wait()

    engine.capture = capture  # type: ignore[method-assign]
    job = (await client.post("/v1/activations", json={"model": MODEL, "input": TEXTS, "sites": {"resid_post": [1]}})
           ).json()
    await begun.wait()
    if how == "is cancelled":
        await client.post(f"/v1/jobs/{job['id']}/cancel")
    while job["status"] not in FINISHED:
        await asyncio.sleep(0.005)
        job = (await client.get(f"/v1/jobs/{job['id']}")).json()
    if how == "fails":
        # The disk is not to blame for what the engine meets.
        assert job["error"]["code"] == "internal_error", job
    folder = settings.data_dir / "activations"
    while list(folder.iterdir()):
        await asyncio.sleep(0.005)
    assert (await client.get("/v1/activations")).json() == {"data": []}


async def test_a_disk_that_fails_while_rows_are_written_is_named(
        client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*given: Any) -> int:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr("server.activations.table.os.pwrite", pwrite)
    job = await ended(client)
    assert job["status"] == "failed" and job["error"]["code"] == "storage_unavailable", job


class Kept:
    """A store whose clock is set by the test."""

    def __init__(self, folder: Path, most_bytes: int = 10**6) -> None:
        self.now = 1000.0
        self.store = StoredActivations(folder, most_bytes=most_bytes, seconds=100.0, now=lambda: self.now)

    def described(self, seconds: float | None = None, **fields: Any) -> Activations:
        created, expires = self.store.expiry(seconds)
        return Activations.model_validate({
            "id": "act-" + "a" * 24, "created_at": created, "expires_at": expires, "model": MODEL, "fingerprint": "f",
            "texts": 1, "tokens": 1, "rows": 1, "sites": {}, "pool": "none", "dtype": "float32", "bytes": 1,
            "applied": [], "tenant": "default", **fields})


COLUMNS = {"text": Column(torch.int32, 5), "resid_post.0": Column(torch.float16, 5, 3)}


def test_a_file_is_what_the_packages_own_reader_reads(tmp_path: Path) -> None:
    table = Table(tmp_path / "t", COLUMNS, {"model": "m"})
    rows = torch.randn(5, 3)
    # Rows come in any order.
    table.put("resid_post.0", 3, rows[3:])
    table.put("resid_post.0", 0, rows[:3])
    table.put("text", 0, torch.arange(5))
    with pytest.raises(ValueError, match="do not fit"):
        table.put("resid_post.0", 4, rows[:2])
    table.close()
    assert (tmp_path / "t").stat().st_size == size_of(COLUMNS, {"model": "m"})
    with safe_open(tmp_path / "t", "pt") as file:
        assert file.metadata() == {"model": "m"}
        assert torch.equal(file.get_tensor("resid_post.0"), rows.half())
        assert file.get_tensor("text").tolist() == [0, 1, 2, 3, 4]


def test_they_go_when_their_time_is_over(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    with kept.store.writing(described := kept.described(50.0), COLUMNS, {}):
        pass
    assert kept.store.find(described.id) == described and described.expires_at == 1050
    kept.now = 1051.0
    with pytest.raises(NotFound):
        kept.store.find(described.id)
    assert list(tmp_path.iterdir()) == []
    # Nobody may ask for a longer time than the server's.
    assert kept.store.expiry(10**6) == (1051, 1151)


def test_what_is_being_written_counts_for_the_limit(tmp_path: Path) -> None:
    kept = Kept(tmp_path, most_bytes=int(size_of(COLUMNS, {}) * 1.5))
    with kept.store.writing(kept.described(), COLUMNS, {}), pytest.raises(FilesFull):
        kept.store.check_room(COLUMNS, {})
    kept.store.delete("act-" + "a" * 24)
    kept.store.check_room(COLUMNS, {})


def test_what_a_killed_server_left_is_removed_in_time(tmp_path: Path, age: Callable[[Path, float], None]) -> None:
    kept = Kept(tmp_path)
    for name in ("act-" + "b" * 24 + ".partial", "act-" + "c" * 24 + ".safetensors"):
        (tmp_path / name).write_bytes(b"half")
        age(tmp_path / name, 1000.0)
    kept.store.sweep()
    assert len(list(tmp_path.iterdir())) == 2
    kept.now += 2 * 86400
    kept.store.sweep()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def age() -> Callable[[Path, float], None]:
    import os

    return lambda path, at: os.utime(path, (at, at))


async def test_housekeeping_removes_them(app: FastAPI, client: httpx.AsyncClient, settings: Settings) -> None:
    told, _ = await captured(client)
    path = settings.data_dir / "activations" / f"{told['id']}.json"
    path.write_text(json.dumps({**told, "expires_at": 1}))
    await asyncio.to_thread(app.state.server.activations.sweep)
    assert list(path.parent.iterdir()) == []


async def test_a_file_of_another_server_is_kept_and_comes_back_as_it_was(client: httpx.AsyncClient) -> None:
    told, _ = await captured(client)
    file = (await client.get(f"/v1/activations/{told['id']}/content")).content
    answer = await client.post("/v1/activations/import", content=file, headers=OCTETS)
    assert answer.status_code == 201, answer.text
    again = answer.json()
    assert again["id"] != told["id"]
    kept, given = [load((await client.get(f"/v1/activations/{one['id']}/content")).content) for one in (again, told)]
    assert kept.keys() == given.keys() and all(torch.equal(kept[name], given[name]) for name in given)
    same = ("model", "fingerprint", "texts", "tokens", "rows", "sites", "pool", "dtype", "bytes", "tenant")
    assert {key: again[key] for key in same} == {key: told[key] for key in same}
    means, _ = await captured(client, pool="mean", dtype="bfloat16")
    file = (await client.get(f"/v1/activations/{means['id']}/content")).content
    again = (await client.post("/v1/activations/import", content=file, headers=OCTETS)).json()
    assert {key: again[key] for key in same} == {key: means[key] for key in same}


OCTETS = {"Content-Type": "application/octet-stream"}
TOLD = {"model": "m", "fingerprint": "f", "pool": "none", "positions": "null"}


def _file(told: dict[str, str] | None = None, **tensors: torch.Tensor) -> bytes:
    index = torch.zeros(2, dtype=torch.int32)
    named = {"text": index, "position": index, "token": index, "resid_post.1": torch.ones(2, 4), **tensors}
    return save({name: tensor.clone() for name, tensor in named.items()}, TOLD if told is None else told)


@pytest.mark.parametrize("data", [
    b"", b"x" * 40, b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", _file()[:-3], _file({}),
    _file(TOLD | {"pool": "median"}), _file(other=torch.ones(2)), _file(**{"resid_post.1": torch.ones(3, 4)}),
    _file(**{"resid_post.1": torch.ones(2, dtype=torch.int64)}), _file(**{"resid_post.2": torch.ones(2, 4).half()}),
    _file(text=torch.tensor([1, 0], dtype=torch.int32)), _file(token=torch.tensor([-1, 0], dtype=torch.int32)),
    _file(position=torch.zeros(2)), _file(TOLD | {"model": "m" * 100_000}), _file(**{"elsewhere.1": torch.ones(2, 4)}),
], ids=range(16))
async def test_other_files_are_refused(client: httpx.AsyncClient, data: bytes) -> None:
    before = (await client.get("/v1/activations")).json()
    answer = await client.post("/v1/activations/import", content=data, headers=OCTETS)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file"), answer.text
    assert (await client.get("/v1/activations")).json() == before


async def test_an_import_has_a_type_and_room(client: httpx.AsyncClient, app: FastAPI) -> None:
    answer = await client.post("/v1/activations/import", content=_file(), headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415
    assert (await client.post("/v1/activations/import", content=_file(), headers=OCTETS)).status_code == 201
    app.state.server.activations._most_bytes = 100
    answer = await client.post("/v1/activations/import", content=_file(), headers=OCTETS)
    assert answer.json()["error"]["code"] == "files_full", answer.text
