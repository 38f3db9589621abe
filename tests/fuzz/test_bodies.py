"""Bodies drawn from the OpenAPI file, sent to the whole server on a tiny model: none makes it fail, hang or keep
anything."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from pydantic import SecretStr
from safetensors.torch import save

from server.app import create_app
from server.batches.batches import OPEN
from server.cli.inprocess import running
from server.engines.data import Generation
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from server.requests.state import ServerState
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.fuzz.drawing import (
    CAPTURED,
    D_MODEL,
    GATED,
    LAYERS,
    MODEL,
    PRESET,
    PROBE,
    ROLLED,
    SAE,
    UPLOADED,
    VECTOR,
    Endpoint,
    endpoints,
)
from tests.server.tokenizers import byte_tokenizer
from tests.tiny import tiny
from vectors.library import Library

torch.set_num_threads(1)
# What this engine refuses whatever the body says.
REFUSED = ("/v1/embeddings", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
# Seconds in which any body must be answered, and what it left must be gone, on a machine that does much besides.
ANSWERED_S, RESTING_S = 120.0, 120.0
LEAST_S = 0.001
OWNER = {"Authorization": "Bearer owner"}
# Bodies of each endpoint. `make test-fuzz` sends 2 000, which takes hours.
BODIES = int(os.environ.get("TRIMTAB_FUZZ_BODIES", "24"))
# Values of labels of metrics that the bodies of one endpoint may add: statuses, codes and fields, but no drawn names.
LABELS = 60
# Of jobs that were begun every so many one runs to its end; the others are cancelled, which is to leave nothing either.
RUN_OF = 200
ENDPOINTS = endpoints()


class Served:
    """file: id of an uploaded file of requests. key: id of a key that nobody uses. rollout: id of one that runs.
    captured: id of activations."""

    def __init__(self, app: FastAPI, client: httpx.Client, file: str, key: str, rollout: str, captured: str) -> None:
        self.app, self.client, self.file, self.key, self.rollout = app, client, file, key, rollout
        self.captured = captured

    @property
    def state(self) -> ServerState:
        state: ServerState = self.app.state.server
        return state

    def left(self) -> dict[str, Any]:
        """What is not at rest, by name."""
        state, stats = self.state, self.state.engine.stats()
        held = {"open requests": len(self.app.state.open_requests), "runs": len(state.runs),
                "places": state.queue.running, "waiting requests": state.queue._totals["requests"],
                "waiting tokens": state.queue._totals["tokens"], "clients": sum(map(len, state.queue._own.values())),
                "responses": len(state.running_responses), "jobs": len(state.jobs._tasks),
                "running": stats["running"], "waiting": stats["waiting"], "slots": stats["slots_used"]}
        return {name: value for name, value in held.items() if value}

    def labels(self) -> set[str]:
        return set(re.findall(r'(?<![{,]le)="([^"]*)"', self.client.get("/metrics").text))

    def rest(self, about: str) -> None:
        deadline = time.monotonic() + RESTING_S
        while found := self.left():
            assert time.monotonic() < deadline, f"{about} left {found}"
            time.sleep(0.001)

    def finish_batch(self, batch: str) -> None:
        deadline = time.monotonic() + ANSWERED_S
        while self.client.get(f"/v1/batches/{batch}").json()["status"] in OPEN:
            assert time.monotonic() < deadline, f"{batch} does not end"
            time.sleep(0.005)

    def finish_job(self, job: str, *, run: bool) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWERED_S
        while run and time.monotonic() < deadline:
            found: dict[str, Any] = self.client.get(f"/v1/jobs/{job}").json()
            if found["status"] in ("succeeded", "failed", "cancelled"):
                return found
            time.sleep(0.005)
        self.client.post(f"/v1/jobs/{job}/cancel")
        return {"status": "cancelled"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fuzz")
    tokenizer = byte_tokenizer()
    tiny("qwen3", vocab_size=len(tokenizer), num_hidden_layers=LAYERS).save_pretrained(folder / "model")
    engine = TransformersEngine(EngineOptions(model=str(folder / "model"), model_id=MODEL, kv_cache_tokens=8192,
                                              max_batch_tokens=512, page_size=8, self_test=False, max_requests=16))
    library = Library.open(f"sqlite:///{folder / 'library.db'}", str(folder / "blobs"))
    chosen = Settings(model=str(folder / "model"), served_model_name=MODEL, data_dir=folder / "data", max_requests=16,
                      max_output_tokens=16, api_key=SecretStr("owner"))
    app = create_app(chosen, engine, library, Vocabulary(tokenizer, [tokenizer.eos_token_id], len(tokenizer)))
    with running(app) as url, httpx.Client(base_url=url, timeout=ANSWERED_S, headers=OWNER) as client:
        for name, kind, op in ((VECTOR, "vector", "add"), (PROBE, "probe", "add")):
            tensors = {"vector": [0.5] * D_MODEL} if kind == "vector" else {"weight": [0.5] * D_MODEL, "bias": 0.0}
            made = client.post("/v1/artifacts", json={
                "metadata": {"name": name, "kind": kind, "op": op, "site": "resid_post", "d_model": D_MODEL,
                             "residual_norm": {"1": 10.0}},
                "tensors": {"1": tensors}})
            assert made.status_code == 201, made.text
        # Said to be of another model, it is stored unchecked.
        made = client.post("/v1/artifacts", json={
            "metadata": {"name": SAE, "kind": "sae", "op": "sae", "site": "resid_post", "model_id": "other"},
            "tensors": {"1": {"encoder": [[0.5] * D_MODEL] * 8, "encoder_bias": [0.0] * 8,
                              "decoder": [[0.25] * D_MODEL] * 8, "decoder_bias": [0.0] * D_MODEL}}})
        assert made.status_code == 201, made.text
        for strength in (0.5, 0.25):
            made = client.post("/v1/presets", json={"name": PRESET, "spec": {"interventions": [
                {"artifact": VECTOR, "strength": strength}]}})
            assert made.status_code == 201, made.text
        for alias in (ROLLED, GATED):
            assert client.put(f"/v1/presets/{PRESET}/aliases/{alias}", json={"version": 1}).status_code == 200
        rollout = client.post("/v1/admin/rollouts", json={"target": f"{PRESET}@{ROLLED}", "candidate": 2,
                                                          "steps": [{"share": 0.5}]})
        assert rollout.status_code == 201, rollout.text
        assert client.post(f"/v1/admin/rollouts/{rollout.json()['id']}/publish").status_code == 200
        line = {"custom_id": "1", "method": "POST", "url": "/v1/completions",
                "body": {"model": MODEL, "prompt": "hello", "max_tokens": 2}}
        sent = client.post("/v1/files", files={"file": ("requests.jsonl", json.dumps(line))}, data={"purpose": "batch"})
        assert sent.status_code == 200, sent.text
        key = client.post("/v1/admin/keys", json={"name": "unused", "roles": ["infer"]})
        assert key.status_code == 201, key.text
        index = torch.arange(4, dtype=torch.int32)
        file = save({"text": index * 0, "position": index, "token": index.clone(),
                     "resid_post.1": torch.ones(4, D_MODEL)},
                    {"model": "other", "fingerprint": "other", "pool": "none", "positions": "null"})
        captured = client.post("/v1/activations/import", content=file,
                               headers={"Content-Type": "application/octet-stream"})
        assert captured.status_code == 201, captured.text
        yield Served(app, client, sent.json()["id"], key.json()["id"], rollout.json()["id"], captured.json()["id"])


def send(served: Served, endpoint: Endpoint, number: int) -> Counter[str]:
    """Send `number` bodies; returns how often each status and code was the answer."""
    answers: Counter[str] = Counter()
    begun = 0

    @seed(15)
    @settings(max_examples=number, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(endpoint.requests)
    def one(drawn: tuple[str, Any]) -> None:
        nonlocal begun
        url, body = drawn
        if isinstance(body, dict) and body.get("input_file_id") == UPLOADED:
            body["input_file_id"] = served.file
        if isinstance(body, dict) and body.get("source") == CAPTURED:
            body["source"] = served.captured
        id = served.rollout if "rollouts" in url else served.key
        answer = served.client.request(endpoint.method, url.replace("{id}", id), json=body)
        said = answer.json() if "json" in answer.headers.get("content-type", "") else {}
        code = (said.get("error") or {}).get("code", "") if isinstance(said, dict) else ""
        answers[f"{answer.status_code} {code}".strip()] += 1
        late = code == "request_timeout" and LEAST_S <= body.get("timeout_s", 0) < ANSWERED_S
        assert answer.status_code < 500 or late, (endpoint, body, answer.text)
        assert '"internal_error"' not in answer.text, (endpoint, body, answer.text)
        if answer.status_code == 200 and endpoint.path == "/v1/batches":
            served.finish_batch(said["id"])
        if answer.status_code == 202:
            begun += 1
            job = served.finish_job(said["id"], run=begun % RUN_OF == 1)
            answers[f"job {job['status']} {(job.get('error') or {}).get('code', '')}".strip()] += 1
            assert (job.get("error") or {}).get("code") != "internal_error", (endpoint, body, job)
        served.rest(f"{endpoint} {body}")

    one()
    return answers


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=str)
def test_drawn_bodies(served: Served, endpoint: Endpoint) -> None:
    before = served.labels()
    try:
        answers = send(served, endpoint, BODIES)
    finally:
        served.client.put("/v1/admin/kill-switch", json={"on": False})
        served.client.delete("/v1/admin/default-spec")
    accepted = sum(count for answer, count in answers.items() if answer.startswith("2"))
    # Of bodies that are all refused early nothing is learnt.
    assert accepted or endpoint.path in REFUSED, answers
    new = served.labels() - before
    assert len(new) < LABELS, sorted(new)[:20]


def test_what_is_left_is_seen(served: Served) -> None:
    """The control: a request under way is no rest."""
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 16, "ignore_eos": True, "stream": True, "n": 3,
            "steering": {"interventions": [{"artifact": VECTOR}]}}
    seen: set[str] = set()
    state, admit = served.state, served.state.engine.generate

    def look(generation: Generation) -> Any:
        completion = admit(generation)
        seen.update(served.left())
        return completion

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state.engine, "generate", look)
        assert served.client.post("/v1/completions", json=body).status_code == 200
    served.rest("a stream")
    assert {"open requests", "runs", "places"} <= seen
