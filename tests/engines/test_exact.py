"""The engine's log-probabilities against plain Hugging Face hooks: every op, a dozen different specs in one batch."""

import asyncio
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engines import reference as ref
from tests.engines.conftest import compiled, generate, ids

TOLERANCE = 1e-4
D, D_FF, HEADS, HEAD_DIM = 32, 56, 4, 12


def _vector(seed: int, width: int = D, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)) * scale


def _basis(seed: int, rank: int, width: int = D) -> torch.Tensor:
    return torch.linalg.qr(_vector(seed, width * rank).reshape(width, rank)).Q.T.contiguous()


Case = tuple[list[dict[str, Any]], list[ref.Edit]]


def _dense_cases() -> list[Case]:
    """Spec and the same thing as hooks. Together: every op but expert_mask, every residual site, stacks, scopes."""
    v, u, w = _vector(1, scale=3.0), _vector(2), _vector(3, scale=2.0)
    basis, plane = _basis(4, 3), _basis(5, 2)
    up, down, bias = _vector(6, 2 * D).reshape(2, D), _vector(7, 2 * D).reshape(2, D) * 0.3, _vector(8, 2)
    dims, signs = torch.tensor([0, 3, 7, 11, 19, 30]), torch.tensor([1, -1, 1, 1, -1, -1])
    heads_shift = _vector(9, 2 * HEAD_DIM).reshape(2, HEAD_DIM)
    neurons, values = [2, 5, 40], _vector(10, 3)
    head_columns = [c for head in (1, 3) for c in range(head * HEAD_DIM, (head + 1) * HEAD_DIM)]
    shift = torch.zeros(HEADS * HEAD_DIM)
    shift[head_columns] = heads_shift.flatten()
    gen = {"prompt": "none", "generation": "all"}
    last = {"prompt": {"positions": [-1]}, "generation": "all"}
    ring = torch.cat([torch.stack([(torch.arange(5) * 1.2566).cos(), (torch.arange(5) * 1.2566).sin()], 1) * 4,
                      _vector(11, 5).reshape(5, 1)], dim=1)
    manifold = {"basis": basis.tolist(), "mean": w.tolist(), "knots": [[n] for n in range(5)],
                "points": ring.tolist(), "period": [5], "labels": list("abcde")}
    return [
        ([{"op": "add", "layers": [1], "inline": {"vector": v.tolist()}, "strength": 1.5}],
         [ref.Edit("resid_post", 1, ref.add(1.5 * v), ref.everywhere)]),
        ([{"op": "add", "site": "resid_pre", "layers": [0, 2], "inline": {"vector": v.tolist()}, "scope": gen,
           "options": {"norm_match": True}, "strength": 0.8}],
         [ref.Edit("resid_pre", n, ref.add_norm_match(v, 0.8), ref.generated_only) for n in (0, 2)]),
        ([{"op": "add", "site": "attn_out", "layers": [1], "inline": {"vector": w.tolist()}, "scope": last,
           "options": {"preserve_norm": True}}],
         [ref.Edit("attn_out", 1, ref.add_keep_norm(w), ref.last_prompt_and_generated)]),
        ([{"op": "ablate", "layers": "all", "inline": {"basis": {str(n): basis.tolist() for n in range(3)}}}],
         [ref.Edit("resid_post", n, ref.project_out(basis), ref.everywhere) for n in range(3)]),
        ([{"op": "ablate", "inline": {"vector": u.tolist()}, "options": {"multi_site": True}}],
         [ref.Edit(site, n, ref.project_out((u / u.norm())[None]), ref.everywhere)
          for n in range(3) for site in ("resid_pre", "attn_out", "mlp_out")]),
        ([{"op": "clamp", "site": "mlp_out", "layers": [2], "inline": {"vector": u.tolist(), "min": -0.1, "max": 0.4}}],
         [ref.Edit("mlp_out", 2, ref.clip_along(u, -0.1, 0.4), ref.everywhere)]),
        ([{"op": "rotate", "layers": [1], "inline": {"basis": plane.tolist(), "angle": 140}, "scope": gen}],
         [ref.Edit("resid_post", 1, ref.turn_to(plane, 140), ref.generated_only)]),
        ([{"op": "affine", "layers": [0], "inline": {"up": up.tolist(), "down": down.tolist(), "bias": bias.tolist()}}],
         [ref.Edit("resid_post", 0, ref.low_rank(up, down, bias), ref.everywhere)]),
        ([{"op": "sign_flip", "layers": [2], "inline": {"dims": dims.tolist(), "polarity": signs.tolist()}}],
         [ref.Edit("resid_post", 2, ref.flip_away(dims, signs), ref.everywhere)]),
        ([{"op": "mask", "layers": [1], "inline": {"dims": [4, 9]}, "scope": {"prompt": {"windows": [[1, 4]]},
                                                                           "generation": "none"}},
          {"op": "neuron_mask", "layers": [1], "inline": {"neurons": neurons, "value": values.tolist()},
           "options": {"mode": "set"}}],
         [ref.Edit("resid_post", 1, ref.set_columns([4, 9], torch.zeros(2)), ref.prompt_window(1, 4)),
          ref.Edit("mlp_act", 1, ref.set_columns(neurons, values), ref.everywhere)]),
        ([{"op": "head_mask", "layers": [0], "inline": {"heads": [1, 3], "shift": heads_shift.tolist(),
                                                        "mode": "shift"}, "strength": 2.0},
          {"op": "head_mask", "layers": [2], "inline": {"heads": [1, 3]}, "options": {"scale": 0.25}}],
         [ref.Edit("head_out", 0, ref.add(2 * shift), ref.everywhere),
          ref.Edit("head_out", 2, ref.scale_columns(head_columns, 0.25), ref.everywhere)]),
        # Two swaps with a vector between them, the second from where each token then is.
        ([{"op": "manifold", "layers": [1], "inline": {**manifold, "target": "d", "source": "b", "fraction": 0.75},
           "scope": last},
          {"op": "add", "layers": [1], "inline": {"vector": v.tolist()}},
          {"op": "manifold", "layers": [1], "inline": {**manifold, "shift": 1.5}}],
         [ref.Edit("resid_post", 1, ref.swap_part(basis, w, ref.closed_spline(ring)(2.5)),
                   ref.last_prompt_and_generated),
          ref.Edit("resid_post", 1, ref.add(v), ref.everywhere),
          ref.Edit("resid_post", 1, ref.shift_part(basis, w, ring, 1.5), ref.everywhere)]),
        # Order is meaning: patch within a subspace, then add, then ablate, all at one site.
        ([{"op": "patch", "layers": [1], "inline": {"basis": basis.tolist(), "mean": v.tolist()}},
          {"op": "add", "layers": [1], "inline": {"vector": w.tolist()}},
          {"op": "ablate", "layers": [1], "inline": {"vector": u.tolist()}},
          {"op": "patch", "layers": [0], "inline": {"vector": w.tolist()}, "scope": {"prompt": {"positions": [2]},
                                                                                  "generation": "none"}}],
         [ref.Edit("resid_post", 1, ref.replace_by(v, basis), ref.everywhere),
          ref.Edit("resid_post", 1, ref.add(w), ref.everywhere),
          ref.Edit("resid_post", 1, ref.project_out((u / u.norm())[None]), ref.everywhere),
          ref.Edit("resid_post", 0, ref.replace_by(w), ref.prompt_window(2, 3))]),
    ]


def _moe_cases() -> list[Case]:
    """The five expert modes at both mixture layers (0 and 2), alone and stacked with a vector."""
    v = _vector(1, scale=3.0)
    every = {"experts": {"0": [1, 4], "2": [3]}}
    numbers = {"off": ({}, 0.0), "off_refill": ({}, 0.0), "force": ({}, 0.0), "scale": ({"scale": 0.3}, 0.3),
               "bias": ({"bias": 2.5}, 2.5)}
    cases: list[Case] = []
    for mode, (options, number) in numbers.items():
        edits = [ref.Edit("router", layer, ref.experts(mode, listed, 2, number), ref.everywhere)
                 for layer, listed in ((0, [1, 4]), (2, [3]))]
        spec = [{"op": "expert_mask", "inline": {**every, "mode": mode}, "options": options}]
        cases.append((spec, edits))
        cases.append(([*spec, {"op": "add", "layers": [0], "inline": {"vector": v.tolist()}}],
                      [*edits, ref.Edit("resid_post", 0, ref.add(v), ref.everywhere)]))
    cases.append(([{"op": "expert_mask", "inline": every, "scope": {"prompt": "none"}}],
                  [ref.Edit("router", layer, ref.experts("off", listed, 2), ref.generated_only)
                   for layer, listed in ((0, [1, 4]), (2, [3]))]))
    cases.append(([{"op": "add", "site": "mlp_out", "layers": [2], "inline": {"vector": v.tolist()}}],
                  [ref.Edit("mlp_out", 2, ref.add(v), ref.everywhere)]))
    return cases


def _prompt(i: int) -> list[int]:
    return [3 + (i * 7 + 5 * t + t * t) % 90 for t in range(6 + i % 5)]


@pytest.mark.parametrize(("family", "cases"), [("qwen3", _dense_cases()), ("qwen3_moe", _moe_cases())],
                         ids=["dense", "moe"])
async def test_mixed_batch_equals_hooks(start_engine: Any, model_dir: Any, family: str, cases: list[Case]) -> None:
    """All specs and an unsteered request at once, prefilled in chunks of 16 tokens: each as if it were alone."""
    engine = await start_engine(family, max_batch_tokens=16, max_requests=16)
    model = AutoModelForCausalLM.from_pretrained(model_dir(family), dtype=torch.float32).eval()
    programs = [None, *(compiled(engine, *spec) for spec, _ in cases)]
    edits = [[], *(edits for _, edits in cases)]
    assert len(cases) >= 12
    mixed = await asyncio.gather(*(generate(engine, _prompt(i), p) for i, p in enumerate(programs)))
    for i, (tokens, _) in enumerate(mixed):
        prompt = _prompt(i)
        expected = ref.logprobs(model, prompt + ids(tokens), len(prompt), edits[i])[len(prompt) - 1:-1]
        for token, row in zip(tokens, expected, strict=True):
            assert token.token_id == int(row.argmax())
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE)
            for other, value in token.top_logprobs:
                assert value == pytest.approx(float(row[other]), abs=TOLERANCE)
        if i:
            base = ref.logprobs(model, prompt + ids(tokens), len(prompt), [])[len(prompt) - 1:-1]
            assert float((base - expected).abs().max()) > 100 * TOLERANCE, "the spec does not show in this test"


@pytest.mark.parametrize(("family", "cases"), [("qwen3", _dense_cases()), ("qwen3_moe", _moe_cases())],
                         ids=["dense", "moe"])
async def test_alone_mixed_cached_and_scored_agree(start_engine: Any, family: str, cases: list[Case]) -> None:
    engine = await start_engine(family)
    prompt = [5 + (3 * t) % 80 for t in range(21)]
    programs = [compiled(engine, *spec) for spec, _ in cases]
    alone = [await generate(engine, prompt, p) for p in programs]
    # The second time all at once, on the same prompt: every page but the last is in the cache, salted by program.
    mixed = await asyncio.gather(*(generate(engine, prompt, p) for p in programs))
    for program, (first, touched), (second, touched_again) in zip(programs, alone, mixed, strict=True):
        assert ids(first) == ids(second)
        assert touched == touched_again
        for a, b in zip(first, second, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=TOLERANCE)
        scores = await engine.score(prompt + ids(first), program, prompt_length=len(prompt))
        assert scores.logprobs[len(prompt):].tolist() == pytest.approx([t.logprob for t in first], abs=TOLERANCE)


@pytest.mark.parametrize("spec", [
    {"op": "add", "layers": "all", "inline": {"vector": _vector(1).tolist()}, "strength": 0},
    {"op": "ablate", "layers": [1], "inline": {"vector": _vector(1).tolist()}, "strength": 0},
    {"op": "sign_flip", "layers": [1], "inline": {"dims": [1, 2], "polarity": [1, -1]}, "strength": 0},
], ids=["add", "ablate", "sign_flip"])
async def test_strength_zero_is_bit_identical(start_engine: Any, spec: dict[str, Any]) -> None:
    engine = await start_engine("qwen3")
    plain = await engine.score(list(range(3, 40)), full=True)
    steered = await engine.score(list(range(3, 40)), compiled(engine, spec), full=True)
    assert torch.equal(plain.full, steered.full)
    tokens, _ = await generate(engine, [3, 4, 5, 6])
    again, touched = await generate(engine, [3, 4, 5, 6], compiled(engine, spec))
    assert [(t.token_id, t.logprob) for t in tokens] == [(t.token_id, t.logprob) for t in again]
    assert touched[0].prompt == touched[0].generation == 0
