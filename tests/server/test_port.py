"""Porting over HTTP: an artifact of another model with that model's activations becomes one of this model; what does
not fit is refused with the field that names it."""

import asyncio
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from server.background.job import FINISHED
from steering.artifacts.payload import Payload
from tests.server.scripted import WIDTH
from tests.server.test_activations import OCTETS, activation
from vectors.artifact import Metadata
from vectors.library import Library

OTHER = "other-weights"
GENERATOR = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(1, 60, (12,), generator=GENERATOR).tolist() for _ in range(30)]
TURN = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=GENERATOR, dtype=torch.float64))[0].float()
VECTOR = torch.randn(WIDTH, generator=GENERATOR)


def file(layer: int = 2, fingerprint: str = OTHER, texts: list[list[int]] = TEXTS, first: int = 0) -> bytes:
    """Activations of a model whose residual stream is a turn of the served one's. first: where each text begins."""
    rows = torch.tensor([activation(token, layer) for text in texts for token in text[first:]])
    columns = {"text": [n for n, text in enumerate(texts) for _ in text[first:]],
               "position": [n for text in texts for n in range(first, len(text))],
               "token": [token for text in texts for token in text[first:]]}
    tensors = {name: torch.tensor(values, dtype=torch.int32) for name, values in columns.items()}
    return save({**tensors, f"resid_post.{layer}": (2 * rows @ TURN.T).contiguous()},
                {"model": "theirs", "fingerprint": fingerprint, "pool": "none", "positions": "null"})


@pytest.fixture(autouse=True)
def theirs(library: Library) -> None:
    library.create(Metadata(name="theirs", kind="vector", op="add", site="resid_post", layers=[2], model_id="theirs",
                            fingerprint=OTHER), Payload.build("vector", {2: {"vector": VECTOR}}))


async def sent(client: httpx.AsyncClient, data: bytes) -> str:
    answer = await client.post("/v1/activations/import", content=data, headers=OCTETS)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def ported(client: httpx.AsyncClient, source: str, ref: str = "theirs", **fields: Any) -> httpx.Response:
    return await client.post(f"/v1/artifacts/{ref}/port", json={"name": "ours", "source": source, **fields})


async def test_what_was_made_elsewhere_becomes_an_artifact_of_this_model(client: httpx.AsyncClient, library: Library
                                                                         ) -> None:
    answer = await ported(client, await sent(client, file()))
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert (job["kind"], job["about"]) == ("port", "theirs@1")
    while job["status"] not in FINISHED:
        await asyncio.sleep(0.005)
        job = (await client.get(f"/v1/jobs/{job['id']}")).json()
    assert job["status"] == "succeeded", job
    report = job["result"]
    assert report["artifact"] == "ours@1" and report["source"] == "theirs@1" and report["source_fingerprint"] == OTHER
    [layer] = report["layers"]
    assert (layer["source_layer"], layer["layer"]) == (2, 2)
    assert layer["explained"] > 0.99 and layer["norm_ratio"] == pytest.approx(0.5, rel=1e-3)
    assert report["texts"] == 30 and report["held_out_texts"] == 6
    stored = library.resolve("ours")
    vector = library.payload(stored).layers[2]["vector"]
    torch.testing.assert_close(vector, 0.5 * VECTOR @ TURN, rtol=1e-2, atol=1e-2)
    assert stored.metadata.fingerprint is not None and stored.metadata.fingerprint != OTHER
    # It steers now, where the original is refused.
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
    assert (await client.post("/v1/completions", json=body | {"steering": {"artifact": "ours"}})).status_code == 200
    refused = await client.post("/v1/completions", json=body | {"steering": {"artifact": "theirs"}})
    assert refused.json()["error"]["code"] == "artifact_mismatch"


@pytest.mark.parametrize(("data", "fields", "code", "param"), [
    (file(fingerprint="a-third"), {}, "artifact_mismatch", "source"),
    (file(layer=1), {}, "invalid_request", "source"),
    (file(first=3), {}, "invalid_request", "source"),
    (file(texts=[[5, 1_000_000]]), {}, "invalid_request", "source"),
    (file(texts=[[5] * 300]), {}, "invalid_request", "source"),
    (file(), {"method": "magic"}, "invalid_request", "method"),
    (file(), {"name": "a/b/c"}, "invalid_request", "name"),
], ids=range(7))
async def test_what_does_not_fit_is_refused(client: httpx.AsyncClient, data: bytes, fields: dict[str, Any], code: str,
                                            param: str) -> None:
    answer = await ported(client, await sent(client, data), **fields)
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), answer.text
    assert answer.status_code == (409 if code == "artifact_mismatch" else 400)


async def test_what_is_missing_is_not_found(client: httpx.AsyncClient) -> None:
    answer = await ported(client, "act-" + "0" * 24)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "source"), answer.text
    answer = await ported(client, await sent(client, file()), ref="nothing")
    assert answer.status_code == 404


async def test_too_little_to_fit_a_map_ends_the_job(client: httpx.AsyncClient, library: Library) -> None:
    job = (await ported(client, await sent(client, file(texts=TEXTS[:5])))).json()
    while job["status"] not in FINISHED:
        await asyncio.sleep(0.005)
        job = (await client.get(f"/v1/jobs/{job['id']}")).json()
    assert job["status"] == "failed" and "too few" in str(job["error"]), job
    assert not [one for one in library.list().items if one.metadata.name == "ours"]
