"""Captures of the embedded engine's server, and patches from them, against plain Hugging Face hooks."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lab import model_path
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from tests.engines.capture_cases import captures_equal_hooks
from tests.engines.patch_cases import patches_equal_hooks
from tests.engines.vllm.apps import client_of, make_app

SITES = {"resid_pre": [1], "resid_post": [0, 2, 5], "attn_out": [3], "mlp_out": [2], "head_out": [4], "mlp_act": [2]}
# A mixture has no neurons of one feed-forward network, but a router.
OF_MIXTURE = {**{site: layers for site, layers in SITES.items() if site != "mlp_act"}, "router": [2]}


@pytest.mark.parametrize(("name", "sites"), [("lab-dense", SITES), ("lab-moe", OF_MIXTURE)])
async def test_rows_and_patches_from_them_are_those_of_plain_hooks(name: str, sites: dict[str, list[int]],
                                                                   tmp_path: Path) -> None:
    folder = str(model_path(name))
    engine = TransformersEngine(EngineOptions(model=folder, model_id=name, self_test=False, dtype="float32",
                                              kv_cache_tokens=4096, max_batch_tokens=64))
    async with client_of(make_app(name, engine, "transformers", tmp_path)) as client:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
        await captures_equal_hooks(client, name, model, sites, 1e-5)
        await patches_equal_hooks(client, name, model, [site for site in ("resid_post", "head_out", "mlp_act")
                                                        if site in sites], 2e-5)
