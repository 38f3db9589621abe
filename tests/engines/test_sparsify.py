"""Sparsification on the embedded engine's server, and thresholds that it measures, against plain Hugging Face hooks."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lab import model_path
from lab.datasets import load
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from tests.engines import reference as ref
from tests.engines.sparsify_cases import BASE, check, sparsified_equals_hooks
from tests.engines.vllm.apps import client_of, make_app

# A mixture has no neurons of one feed-forward network.
SITES = {"lab-dense": ["mlp_act", "head_out"], "lab-moe": ["head_out"]}


@pytest.mark.parametrize("name", SITES)
async def test_what_is_left_out_is_what_hooks_leave_out(name: str, tmp_path: Path) -> None:
    async with client_of(make_app(name, _engine(name), "transformers", tmp_path)) as client:
        await sparsified_equals_hooks(client, name, _model(name), SITES[name], 2e-5)


async def test_measured_thresholds_act_as_hooks_with_the_numbers_of_the_artifact(tmp_path: Path) -> None:
    name, texts = "lab-dense", [record["text"] for record in load("neutral")][:80]
    async with client_of(make_app(name, _engine(name), "transformers", tmp_path)) as client:
        prompts = list(dict.fromkeys(texts))
        answer = await client.post("/v1/extract/sparsity", json={"name": "sparse", "prompts": prompts})
        assert answer.status_code == 202, answer.text
        job = answer.json()
        while job["status"] not in ("succeeded", "failed"):
            await asyncio.sleep(0.02)
            job = (await client.get(f"/v1/jobs/{job['id']}")).json()
        assert job["status"] == "succeeded", job
        model = _model(name)
        numbers = await _numbers(client, "sparse")
        layers = range(model.config.num_hidden_layers)
        for n in layers:
            weight = model.model.layers[n].mlp.down_proj.weight.detach()
            torch.testing.assert_close(numbers[f"{n}.norm"], weight.square().sum(0).sqrt())
        half = numbers["0.shares"].tolist().index(pytest.approx(0.5))
        cuts = {"chess": {n: numbers[f"{n}.cut"][half] / numbers[f"{n}.norm"] for n in layers},
                "threshold": {n: numbers[f"{n}.thresholds"][half] for n in layers}}
        for method, by_layer in cuts.items():
            spec = {"artifact": "sparse", "options": {"method": method, "share": 0.5}}
            answer = await client.post("/v1/completions", json={
                "model": name, "prompt": BASE, "max_tokens": 6, "temperature": 0, "logprobs": 1, "ignore_eos": True,
                "return_token_ids": True, "steering": {"interventions": [spec]}})
            choice = answer.json()["choices"][0]
            edits = [ref.Edit("mlp_act", n, ref.under_left_out(cut), ref.everywhere) for n, cut in by_layer.items()]
            check(model, {"tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"]}, edits, 2e-5)


async def _numbers(client: Any, name: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load as from_bytes

    found = await client.get(f"/v1/artifacts/{name}/download")
    assert found.status_code == 200, found.text
    return from_bytes(found.content)


def _engine(name: str) -> TransformersEngine:
    return TransformersEngine(EngineOptions(model=str(model_path(name)), model_id=name, self_test=False,
                                            dtype="float32", kv_cache_tokens=4096, max_batch_tokens=64))


def _model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path(name), dtype="float32", attn_implementation="eager").eval()
