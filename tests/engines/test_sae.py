"""SAEs over HTTP on a tiny model: what comes in is checked on the model, and edits are those of a hand-written SAE."""

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from server.app import create_app
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.engines import reference as ref
from tests.server.tokenizers import byte_tokenizer
from tests.tiny import tiny
from vectors.library import Library

D, LAYER, MAX_TOKENS = 32, 1, 6
PROMPT = [5, 17, 40, 8, 61, 33, 90]
TOLERANCE = 1e-5
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Served:
    client: httpx.AsyncClient
    engine: TransformersEngine
    model: Any
    tokenizer: Any
    data: Path

    def states(self, ids: list[int], site: str = "resid_post", layer: int = LAYER,
               edits: list[ref.Edit] = []) -> torch.Tensor:  # noqa: B006
        """`[T, width]`, by plain hooks."""
        held: list[torch.Tensor] = []

        def keep(h: torch.Tensor) -> torch.Tensor:
            held.append(h.clone())
            return h

        ref.logprobs(self.model, ids, len(ids), [*edits, ref.Edit(site, layer, keep, ref.everywhere)])
        return held[0]

    async def imported(self, tensors: dict[str, torch.Tensor], **fields: Any) -> httpx.Response:
        return await self.client.post(
            "/v1/artifacts/import", content=save(tensors), headers={"Content-Type": "application/octet-stream"},
            params={"metadata": json.dumps({"name": "features", **fields})})

    async def said(self, steering: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        answer = await self.client.post("/v1/completions", json={
            "model": "tiny", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "logprobs": 1,
            "ignore_eos": True, **({} if steering is None else {"steering": steering}), **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("sae")
    tokenizer = byte_tokenizer()
    tiny("qwen3", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    engine = TransformersEngine(EngineOptions(model=str(folder / "model"), model_id="tiny", kv_cache_tokens=4096,
                                              max_batch_tokens=128, page_size=8))
    library = Library.open(f"sqlite:///{folder / 'library.db'}", str(folder / "blobs"))
    app = create_app(Settings(served_model_name="tiny", data_dir=folder / "data", max_program_numbers=40_000), engine,
                     library, Vocabulary(tokenizer, [tokenizer.eos_token_id], len(tokenizer)))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://localhost", timeout=60) as client:
        yield Served(client, engine, model, tokenizer, folder / "data")
    library.close()


def axes(width: int = D) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(14))).Q


def written(mean: torch.Tensor, width: int = D) -> dict[str, torch.Tensor]:
    """As SAELens writes it: directions round a mean and their opposites, which reconstruct everything."""
    rows = torch.cat([axes(width), -axes(width)])
    return {"W_enc": rows.T.contiguous(), "b_enc": torch.zeros(len(rows)), "W_dec": rows, "b_dec": mean}


def config(site: str = "hook_resid_post", **fields: Any) -> dict[str, Any]:
    return {"d_sae": 2 * D, "metadata": {"hook_name": f"blocks.{LAYER}.{site}"}, **fields}


MEAN = torch.full((D,), 2.0)


def changed(numbers: dict[str, torch.Tensor], changes: dict[int, ref.Function], **more: Any) -> ref.Function:
    encoder = numbers["W_enc"].T
    return ref.features_changed(encoder, numbers["b_enc"] - encoder @ numbers["b_dec"], numbers["W_dec"], changes,
                                **more)


async def test_one_that_reconstructs_comes_in_and_says_how_well(served: Served) -> None:
    answer = await served.imported(written(MEAN), sae={"config": config()})
    assert answer.status_code == 201, answer.text
    stored = answer.json()
    found = stored["card"]["reconstruction"]["layers"][str(LAYER)]
    assert found["explained"] == pytest.approx(1, abs=1e-3) and found["tokens"] > 100 and found["l0"] > 1
    assert stored["fingerprint"] == served.engine.facts.fingerprint and stored["model_id"] == "tiny"
    assert stored["provenance"]["source_format"] == "saelens" and stored["stored_layers"] == [LAYER]


@pytest.mark.parametrize(("turned", "words", "more"), [
    (False, "with the decoder's bias subtracted", {"apply_b_dec_to_input": False}),
    (True, "is the least that is taken", {})])
async def test_a_wrong_convention_is_refused(served: Served, turned: bool, words: str, more: dict[str, Any]) -> None:
    tensors = written(MEAN * 3)
    if turned:
        tensors["W_dec"] = tensors["W_dec"].flip(0).contiguous()
    answer = await served.imported(tensors, name="wrong", sae={"config": config(**more)})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "wrong_convention" and words in error["message"]
    assert (await served.client.get("/v1/artifacts/wrong")).status_code == 404


async def test_numbers_of_a_json_body_are_checked_as_well(served: Served) -> None:
    rows = torch.randn(8, D, generator=torch.Generator().manual_seed(2)).tolist()
    body = {"metadata": {"name": "noise", "kind": "sae", "op": "sae", "site": "resid_post"}, "tensors": {str(LAYER): {
        "encoder": rows, "encoder_bias": [0.0] * 8, "decoder": rows, "decoder_bias": [0.0] * D}}}
    answer = await served.client.post("/v1/artifacts", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_convention")
    # Said to be of another model, it is kept for that one and cannot be checked here.
    body["metadata"]["model_id"] = "large"
    stored = await served.client.post("/v1/artifacts", json=body)
    assert stored.status_code == 201 and stored.json()["card"] is None


async def test_edits_equal_a_hand_written_sae_in_a_mixed_batch(served: Served) -> None:
    """Features set, shifted and scaled, by thresholds and by the largest, at two sites, all at once."""
    states = served.states(PROMPT)
    relu, topk = written(MEAN), written(torch.zeros(D))
    assert (await served.imported(relu, name="by-relu", sae={"config": config()})).status_code == 201
    answer = await served.imported(topk, name="by-topk", sae={
        "config": config("hook_mlp_out", activation_fn_str="topk", activation_fn_kwargs={"k": 20})})
    assert answer.status_code == 201, answer.text
    strongest = int(((states - MEAN) @ relu["W_enc"]).mean(0).argmax())
    cases: list[tuple[list[dict[str, Any]], list[ref.Edit]]] = [
        ([{"artifact": "by-relu", "options": {"features": {str(strongest): {"set": 0}, "7": {"add": 2}}}}],
         [ref.Edit("resid_post", LAYER, changed(relu, {strongest: lambda f: 0 * f, 7: lambda f: f + 2}),
                   ref.everywhere)]),
        ([{"artifact": "by-relu", "options": {"features": {str(strongest): {"scale": -1}}},
           "scope": {"prompt": "none"}}],
         [ref.Edit("resid_post", LAYER, changed(relu, {strongest: lambda f: -f}), ref.generated_only)]),
        ([{"artifact": "by-topk", "options": {"features": {"3": {"add": 1.5}, "35": {"scale": 2}}}},
          {"artifact": "by-relu", "options": {"features": {"11": {"min": 1}}}}],
         [ref.Edit("mlp_out", LAYER, changed(topk, {3: lambda f: f + 1.5, 35: lambda f: 2 * f}, k=20), ref.everywhere),
          ref.Edit("resid_post", LAYER, changed(relu, {11: lambda f: f.clamp_min(1)}), ref.everywhere)])]
    plain, *steered = await asyncio.gather(served.said(), *(served.said({"interventions": spec}) for spec, _ in cases))
    unsteered = plain["choices"][0]["logprobs"]["token_logprobs"]
    for (spec, edits), answer in zip(cases, steered, strict=True):
        found, ids, expected = answer["choices"][0]["logprobs"]["token_logprobs"], list(PROMPT), []
        for _ in range(MAX_TOKENS):
            row = ref.logprobs(served.model, ids, len(PROMPT), edits)[-1]
            ids.append(int(row.argmax()))
            expected.append(float(row.max()))
        assert found == pytest.approx(expected, abs=TOLERANCE)
        assert max(abs(a - b) for a, b in zip(found, unsteered, strict=True)) > 100 * TOLERANCE
        applied = answer["steering"]["applied"]
        assert [one["artifact"] for one in applied] == [f"{one['artifact']}@1" for one in spec]
        assert applied[0]["options"]["features"].keys() == spec[0]["options"]["features"].keys()


async def test_what_cannot_be_applied_is_refused_by_name(served: Served) -> None:
    await served.imported(written(MEAN), name="refused", sae={"config": config()})

    async def error(options: dict[str, Any], **fields: Any) -> dict[str, Any]:
        answer = await served.client.post("/v1/completions", json={
            "model": "tiny", "prompt": PROMPT, "max_tokens": 1,
            "steering": {"interventions": [{"artifact": "refused", "options": options, **fields}]}})
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]  # type: ignore[no-any-return]

    assert "64 does not exist" in (await error({"features": {"64": {"set": 1}}}))["message"]
    assert (await error({"features": {"64": {"set": 1}}}))["param"].endswith("options.features.64")
    assert "exactly one" in (await error({"features": {"1": {"set": 1, "add": 2}}}))["message"]
    assert (await error({"features": {"x": {"set": 1}}}))["code"] == "invalid_spec"
    assert (await error({}))["code"] == "invalid_spec"
    assert (await error({"features": {"1": {"set": 1}}}, strength={"value": 1, "unit": "sigma"}))["param"].endswith(
        "strength.unit")


async def test_all_of_a_topk_encoder_is_bounded(served: Served) -> None:
    count = 40_000 // D + 1
    rows = torch.randn(count, D, generator=torch.Generator().manual_seed(3)) / math.sqrt(D)
    large = {"W_enc": rows.T.contiguous(), "b_enc": torch.zeros(count), "W_dec": rows, "b_dec": torch.zeros(D)}
    answer = await served.imported(large, name="large", model_id="other", sae={
        "config": {**config(), "d_sae": count, "architecture": "topk", "k": 30}})
    assert answer.status_code == 201, answer.text
    refused = await served.client.post("/v1/completions", json={
        "model": "tiny", "prompt": PROMPT, "max_tokens": 1, "steering": {"interventions": [
            {"artifact": "large", "options": {"features": {"1": {"set": 1}}}, "override": ["model"]}]}})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "program_too_large")


def hand(states: torch.Tensor) -> torch.Tensor:
    """Features of `written(MEAN)`."""
    return ((states - MEAN) @ written(MEAN)["W_enc"]).relu()


async def test_features_of_a_text_are_those_of_a_hand_written_sae(served: Served) -> None:
    await served.imported(written(MEAN), name="read", sae={"config": config()})
    push = {"op": "add", "layers": [0], "inline": {"vector": [1.5] + [0.0] * (D - 1)}, "scope": {"prompt": {
        "windows": [[2, None]]}}}
    edits = [ref.Edit("resid_post", 0, lambda h: h + torch.eye(D)[0] * 1.5, ref.prompt_window(2, 99))]
    for steering, given in (({}, []), ({"interventions": [push]}, edits)):
        answer = await served.client.post("/v1/features", json={
            "model": "tiny", "input": PROMPT, "artifact": "read", "features": [3, 40], "top_k": 4,
            "steering": steering})
        assert answer.status_code == 200, answer.text
        found, expected = answer.json(), hand(served.states(PROMPT, edits=given))
        assert (found["artifact"], found["site"], found["layer"]) == ("read@1", "resid_post", LAYER)
        assert found["explained"] == pytest.approx(1, abs=1e-4)
        for entry, values in zip(found["positions"], expected, strict=True):
            assert entry["active"] == int((values > 0).sum()) and entry["explained"] == pytest.approx(1, abs=1e-4)
            strongest = values.topk(4)
            assert [one["feature"] for one in entry["top"]] == strongest.indices.tolist()
            assert [one["value"] for one in entry["top"]] == pytest.approx(strongest.values.tolist(), abs=1e-4)
            assert [one["value"] for one in entry["features"]] == pytest.approx(values[[3, 40]].tolist(), abs=1e-4)
        best = expected.max(0).values.topk(4)
        assert [one["feature"] for one in found["top"]] == best.indices.tolist()
        first = found["top"][0]
        assert first["tokens"] == int((expected[:, first["feature"]] > 0).sum())
        assert first["mean"] == pytest.approx(float(expected[:, first["feature"]].mean()), abs=1e-4)
        assert len(found["steering"]["applied"]) == len(given)


@pytest.mark.parametrize(("fields", "status", "param"), [
    ({"artifact": "nobody"}, 404, "artifact"), ({"artifact": "a-push"}, 409, "artifact"),
    ({"features": [64]}, 400, "features"), ({"layer": 2}, 400, "layer"), ({"layer": 9}, 400, "layer"),
    ({"positions": [7]}, 400, "positions[0]"), ({"top_k": 101}, 400, "top_k"),
    ({"steering": {"monitor": ["a-push"]}}, 400, "steering.monitor")])
async def test_what_cannot_be_read_is_refused(served: Served, fields: dict[str, Any], status: int, param: str) -> None:
    await served.imported(written(MEAN), name="asked", sae={"config": config()})
    await served.client.post("/v1/artifacts", json={
        "metadata": {"name": "a-push", "kind": "vector", "op": "add", "site": "resid_post"},
        "tensors": {"1": {"vector": [1.0] * D}}})
    answer = await served.client.post("/v1/features", json={
        "model": "tiny", "input": PROMPT, "artifact": "asked", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


async def test_monitors_and_gates_on_features(served: Served) -> None:
    await served.imported(written(MEAN), name="watched", sae={"config": config()})
    values = hand(served.states(PROMPT))
    index = int(values[1:].mean(0).argmax())
    mean = float(values[1:, index].mean())
    watched = await served.said({"monitor": [{"artifact": "watched", "feature": index}]})
    (report,) = watched["steering"]["monitor"]
    assert (report["probe"], report["feature"], report["form"], report["status"]) == (
        "watched@1", index, "feature", "read")
    assert report["choices"][0]["prompt"][str(LAYER)] == pytest.approx(values[:, index].tolist(), abs=1e-4)
    metrics = (await served.client.get("/metrics")).text
    assert f'trimtab_monitor_score{{part="prompt",probe="watched[{index}]"}}' in metrics

    async def opened(threshold: float, **gate: Any) -> tuple[bool, Any]:
        spec = {"op": "add", "layers": [2], "inline": {"vector": [3.0] * D},
                "gate": {"probe": "watched", "feature": index, "threshold": threshold, **gate}}
        answer = await served.said({"interventions": [spec]})
        return answer["steering"]["applied"][0]["choices"][0]["gate"]["open"], answer["choices"][0]["logprobs"]

    plain = (await served.said())["choices"][0]["logprobs"]
    assert (await opened(mean * 1.1)) == (False, plain)
    is_open, logprobs = await opened(mean * 0.9)
    assert is_open and logprobs != plain
    missing = await served.client.post("/v1/completions", json={
        "model": "tiny", "prompt": PROMPT, "max_tokens": 1, "steering": {"monitor": ["watched"]}})
    assert missing.status_code == 400 and "one feature" in missing.json()["error"]["message"]


async def job_of(served: Served, name: str, until: tuple[str, ...] = ("succeeded", "failed", "cancelled"),
                 past: float = 2.0, **fields: Any) -> dict[str, Any]:
    """Start a training at head_out and wait until it is over, or past that share of it."""
    drawn = torch.Generator().manual_seed(6)
    texts = [torch.randint(3, 90, (16,), generator=drawn).tolist() for _ in range(60)]
    answer = await served.client.post("/v1/extract/sae", json={
        "name": name, "texts": texts, "site": "head_out", "layers": [LAYER], "features": 96, "k": 8, "steps": 1200,
        "batch": 64, "seeds": 1, **fields})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["estimate_s"] > 0
    while job["status"] not in until and job["progress"] < past:
        await asyncio.sleep(0.01)
        job = (await served.client.get(f"/v1/jobs/{job['id']}")).json()
    return job  # type: ignore[no-any-return]


async def test_a_training_goes_on_after_it_was_cancelled_and_its_features_are_applied(served: Served) -> None:
    kept = served.data / "jobs"
    job = await job_of(served, "trained", past=0.5)
    assert (await served.client.post(f"/v1/jobs/{job['id']}/cancel")).status_code in (200, 202)
    while job["status"] != "cancelled":
        await asyncio.sleep(0.01)
        job = (await served.client.get(f"/v1/jobs/{job['id']}")).json()
    assert len(list(kept.glob("extract-*.safetensors"))) == 1
    assert (await served.client.get("/v1/artifacts/trained")).status_code == 404
    done = await job_of(served, "trained")
    assert done["status"] == "succeeded", done
    assert not list(kept.glob("extract-*.safetensors"))
    whole = await job_of(served, "whole")
    assert done["result"]["report"] == whole["result"]["report"]
    stored = [(await served.client.get(f"/v1/artifacts/{name}@1")).json() for name in ("trained", "whole")]
    assert stored[0]["digest"] == stored[1]["digest"] and stored[0]["site"] == "head_out"
    assert stored[0]["card"]["explained"] == done["result"]["report"]["explained"] > 0.5
    plain = await served.said()
    options: list[dict[str, Any]] = [{"features": {"5": {"add": 9}}}, {"error": "drop"}]
    steered, dropped = [await served.said({"interventions": [{"artifact": "trained", "options": one}]})
                        for one in options]
    told = [one["choices"][0]["logprobs"] for one in (plain, steered, dropped)]
    assert told[0] != told[1] != told[2] != told[0]
    assert dropped["steering"]["applied"][0]["options"]["error"] == "drop"
