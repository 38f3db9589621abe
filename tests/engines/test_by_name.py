"""Stored artifacts, three of different kinds named in one HTTP request, against plain Hugging Face hooks."""

import asyncio
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from server.app import create_app
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from steering.artifacts.payload import KINDS, READ_ONLY
from tests.engines import reference as ref
from tests.server.tokenizers import byte_tokenizer
from tests.tiny import VOCAB_SIZE
from vectors.library import Library

TOLERANCE = 1e-4
MAX_TOKENS = 8
D, HEADS, HEAD_DIM = 32, 4, 12
PROMPT = [5, 17, 40, 8, 61, 33, 90]


def _vector(seed: int, width: int = D, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)) * scale


V, U, W = _vector(1, scale=3.0), _vector(2), _vector(3, scale=2.0)
BASIS = torch.linalg.qr(_vector(4, D * 3).reshape(D, 3)).Q.T.contiguous()
UP, DOWN, BIAS = _vector(6, 2 * D).reshape(2, D), _vector(7, 2 * D).reshape(2, D) * 0.3, _vector(8, 2)
DIMS, SIGNS = torch.tensor([0, 3, 7, 11, 19, 30]), torch.tensor([1, -1, 1, 1, -1, -1])
SHIFT = _vector(9, 2 * HEAD_DIM).reshape(2, HEAD_DIM)
WIDE_SHIFT = torch.zeros(HEADS, HEAD_DIM)
WIDE_SHIFT[[1, 3]] = SHIFT
VALUES = _vector(10, 3)
SCALE = 1 + 0.3 * _vector(11)
PLANE = torch.linalg.qr(_vector(13, D * 2).reshape(D, 2)).Q.T.contiguous()
ANGLES = torch.arange(5) * 2 * math.pi / 5
RING = torch.cat([torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1) * 4, _vector(12, 5).reshape(5, 1)], dim=1)
RING_TENSORS = {"basis": BASIS, "mean": W, "knots": torch.arange(5.0).unsqueeze(1), "points": RING,
                "period": torch.tensor([5.0])}

# Said to be of another model, an SAE is taken in unchecked.
AXES = torch.linalg.qr(_vector(14, D * D).reshape(D, D)).Q
SAE = {"encoder": torch.cat([AXES, -AXES]), "encoder_bias": -torch.cat([AXES, -AXES]) @ W,
       "decoder": torch.cat([AXES, -AXES]), "decoder_bias": W}

NORMS = _vector(15, 56).abs() + 0.1

# name -> metadata, tensors by layer, and the same as hooks. A bare name in a request then means all of it.
Stored = tuple[dict[str, Any], dict[int, dict[str, torch.Tensor]], list[ref.Edit]]
DENSE: dict[str, Stored] = {
    "a-vector": ({"kind": "vector", "op": "add", "site": "resid_post", "strength": {"value": 1.5, "unit": "raw"}},
                 {1: {"vector": V}}, [ref.Edit("resid_post", 1, ref.add(1.5 * V), ref.everywhere)]),
    "a-subspace": ({"kind": "subspace", "op": "ablate", "site": "resid_post"}, {1: {"basis": BASIS}},
                   [ref.Edit("resid_post", 1, ref.project_out(BASIS), ref.everywhere)]),
    "a-sign-pattern": ({"kind": "sign_pattern", "op": "sign_flip", "site": "resid_post"},
                       {2: {"dims": DIMS, "polarity": SIGNS}},
                       [ref.Edit("resid_post", 2, ref.flip_away(DIMS, SIGNS), ref.everywhere)]),
    "a-neuron-set": ({"kind": "neuron_set", "op": "neuron_mask", "site": "mlp_act", "options": {"mode": "set"}},
                     {1: {"neurons": torch.tensor([2, 5, 40]), "value": VALUES}},
                     [ref.Edit("mlp_act", 1, ref.set_columns([2, 5, 40], VALUES), ref.everywhere)]),
    "a-head-set": ({"kind": "head_set", "op": "head_mask", "site": "head_out", "options": {"mode": "shift"},
                    "strength": {"value": 2.0, "unit": "raw"}},
                   {0: {"heads": torch.tensor([1, 3]), "shift": SHIFT}},
                   [ref.Edit("head_out", 0, ref.add(2 * WIDE_SHIFT.flatten()), ref.everywhere)]),
    "an-affine": ({"kind": "affine", "op": "affine", "site": "resid_post"},
                  {0: {"up": UP, "down": DOWN, "bias": BIAS}},
                  [ref.Edit("resid_post", 0, ref.low_rank(UP, DOWN, BIAS), ref.everywhere)]),
    "a-diagonal": ({"kind": "diagonal", "op": "affine", "site": "resid_post"}, {2: {"scale": SCALE, "shift": W}},
                   [ref.Edit("resid_post", 2, lambda h: SCALE * h + W, ref.everywhere)]),
    "a-dim-mask": ({"kind": "dim_mask", "op": "mask", "site": "resid_post"}, {1: {"dims": torch.tensor([4, 9])}},
                   [ref.Edit("resid_post", 1, ref.set_columns([4, 9], torch.zeros(2)), ref.everywhere)]),
    "a-probe": ({"kind": "probe", "op": "ablate", "site": "resid_post"},
                {0: {"weight": U, "bias": torch.tensor(0.0)}},
                [ref.Edit("resid_post", 0, ref.project_out((U / U.norm())[None]), ref.everywhere)]),
    "a-ring": ({"kind": "manifold", "op": "manifold", "site": "resid_post",
                "options": {"labels": list("abcde"), "target": "d"}}, {1: RING_TENSORS},
               [ref.Edit("resid_post", 1, ref.swap_part(BASIS, W, RING[3]), ref.everywhere)]),
    "a-shift": ({"kind": "manifold", "op": "manifold", "site": "resid_post", "options": {"shift": 1.5}},
                {2: RING_TENSORS}, [ref.Edit("resid_post", 2, ref.shift_part(BASIS, W, RING, 1.5), ref.everywhere)]),
    "a-plane": ({"kind": "subspace", "op": "rotate", "site": "resid_post", "options": {"angle": 140}}, {2: {
        "basis": PLANE}}, [ref.Edit("resid_post", 2, ref.turn_to(PLANE, 140), ref.everywhere)]),
    "a-clamp": ({"kind": "vector", "op": "clamp", "site": "mlp_out", "options": {"min": -0.1, "max": 0.4}},
                {2: {"vector": U}}, [ref.Edit("mlp_out", 2, ref.clip_along(U, -0.1, 0.4), ref.everywhere)]),
    "a-dictionary": ({"kind": "sae", "op": "sae", "site": "resid_post", "model_id": "another", "options": {"features": {
        "2": {"set": 3.0}, "40": {"add": 1.5}, "9": {"scale": 0.0}}}}, {1: SAE},
        [ref.Edit("resid_post", 1, ref.features_changed(SAE["encoder"], SAE["encoder_bias"], SAE["decoder"], {
            2: lambda f: 0 * f + 3, 40: lambda f: f + 1.5, 9: lambda f: 0 * f}), ref.everywhere)]),
    "a-sparsity": ({"kind": "sparsity", "op": "sparsify", "site": "mlp_act", "options": {
        "method": "wina", "share": 0.5}}, {1: {"norm": NORMS}},
        [ref.Edit("mlp_act", 1, ref.small_left_out(0.5, NORMS), ref.everywhere)]),
    "an-ablation": ({"kind": "vector", "op": "ablate", "site": "resid_pre", "options": {"multi_site": True,
                                                                                       "source_layer": 1}},
                    {1: {"vector": U}}, [ref.Edit(site, n, ref.project_out((U / U.norm())[None]), ref.everywhere)
                                         for n in range(3) for site in ("resid_pre", "attn_out", "mlp_out")]),
}
MIXTURE: dict[str, Stored] = {
    "a-vector": DENSE["a-vector"],
    "a-subspace": DENSE["a-subspace"],
    "an-expert-set": ({"kind": "expert_set", "op": "expert_mask", "site": "router"},
                      {0: {"experts": torch.tensor([1, 4])}, 2: {"experts": torch.tensor([3])}},
                      [ref.Edit("router", 0, ref.experts("off", [1, 4], 2), ref.everywhere),
                       ref.Edit("router", 2, ref.experts("off", [3], 2), ref.everywhere)]),
}
STACKS = [
    ("qwen3", DENSE, ["a-vector", "a-subspace", "a-sign-pattern"]),
    ("qwen3", DENSE, ["a-subspace", "a-vector", "a-neuron-set"]),
    ("qwen3", DENSE, ["a-head-set", "an-affine", "a-dim-mask"]),
    ("qwen3", DENSE, ["a-probe", "a-neuron-set", "a-head-set"]),
    ("qwen3", DENSE, ["a-sign-pattern", "a-diagonal", "a-vector"]),
    ("qwen3", DENSE, ["a-ring", "a-vector", "a-plane"]),
    ("qwen3", DENSE, ["a-clamp", "a-shift", "a-head-set"]),
    ("qwen3", DENSE, ["an-ablation", "a-shift", "a-ring"]),
    ("qwen3", DENSE, ["a-dictionary", "a-vector", "a-subspace"]),
    ("qwen3", DENSE, ["a-sparsity", "a-vector", "a-head-set"]),
    ("qwen3_moe", MIXTURE, ["an-expert-set", "a-vector", "a-subspace"]),
]


def greedy(model: Any, edits: list[ref.Edit]) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities, each from a pass over everything so far."""
    ids, said = list(PROMPT), []
    for _ in range(MAX_TOKENS):
        row = ref.logprobs(model, ids, len(PROMPT), edits)[-1]
        ids.append(int(row.argmax()))
        said.append(float(row.max()))
    return ids[len(PROMPT):], said


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
async def test_three_stored_kinds_in_one_request_equal_hooks(family: str, model_dir: Any, tmp_path: Path) -> None:
    """All stacks of a family at once, beside a request without steering."""
    tokenizer = byte_tokenizer()
    engine = TransformersEngine(EngineOptions(model=str(model_dir(family)), model_id="tiny", kv_cache_tokens=4096,
                                              max_batch_tokens=128, page_size=8, self_test=False))
    library = Library.open(f"sqlite:///{tmp_path / 'library.db'}", str(tmp_path / "blobs"))
    app = create_app(Settings(served_model_name="tiny", data_dir=tmp_path / "data"), engine, library,
                     Vocabulary(tokenizer, [tokenizer.eos_token_id], VOCAB_SIZE))
    model = AutoModelForCausalLM.from_pretrained(model_dir(family), dtype=torch.float32).eval()
    stacks = [(stored, names) for of, stored, names in STACKS if of == family]
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://localhost", timeout=60) as client:
        for name, (metadata, tensors, _) in stacks[0][0].items():
            answer = await client.post("/v1/artifacts", json={
                "metadata": {"name": name, **metadata},
                "tensors": {str(layer): {key: value.tolist() for key, value in of_layer.items()}
                            for layer, of_layer in tensors.items()}})
            assert answer.status_code == 201, answer.text

        async def said(names: list[str]) -> dict[str, Any]:
            answer = await client.post("/v1/completions", json={
                "model": "tiny", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "logprobs": 1,
                "ignore_eos": True, "steering": {"interventions": [{"artifact": name} for name in names]}})
            assert answer.status_code == 200, answer.text
            return answer.json()

        plain, *steered = await asyncio.gather(said([]), *(said(names) for _, names in stacks))
    unsteered = plain["choices"][0]["logprobs"]["token_logprobs"]
    assert unsteered == pytest.approx(greedy(model, [])[1], abs=TOLERANCE)
    for (stored, names), answer in zip(stacks, steered, strict=True):
        expected = greedy(model, [edit for name in names for edit in stored[name][2]])[1]
        found = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert found == pytest.approx(expected, abs=TOLERANCE)
        moved = max(abs(a - b) for a, b in zip(found, unsteered, strict=True))
        assert moved > 100 * TOLERANCE, "the steering does not show in this test"
        assert [applied["artifact"] for applied in answer["steering"]["applied"]] == [f"{name}@1" for name in names]


def test_every_kind_is_in_a_stack() -> None:
    kinds = {stored[name][0]["kind"] for _, stored, names in STACKS for name in names}
    assert kinds == set(KINDS) - set(READ_ONLY)
