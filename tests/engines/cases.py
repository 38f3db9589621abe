"""Specs and the same things as plain hooks, for any model of the Qwen3 families with three layers or more."""

from typing import Any

import torch

from tests.engines import reference as ref


def vector(seed: int, width: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)) * scale


def basis_of(seed: int, rank: int, width: int) -> torch.Tensor:
    """Orthonormal rows."""
    return torch.linalg.qr(vector(seed, width * rank).reshape(width, rank)).Q.T.contiguous()


Case = tuple[list[dict[str, Any]], list[ref.Edit]]


def dense_cases(d: int, d_ff: int, num_heads: int, head_dim: int, num_layers: int = 3, scale: float = 1.0
                ) -> list[Case]:
    """Spec and the same thing as hooks. Together: every op but expert_mask, every residual site, stacks, scopes."""
    v, u, w = vector(1, d, 3 * scale), vector(2, d), vector(3, d, 2 * scale)
    basis, plane = basis_of(4, 3, d), basis_of(5, 2, d)
    up, down, bias = vector(6, 2 * d).reshape(2, d), vector(7, 2 * d).reshape(2, d) * 0.3, vector(8, 2)
    dims, signs = torch.tensor([0, 3, 7, 11, 19, 30]), torch.tensor([1, -1, 1, 1, -1, -1])
    heads_shift = vector(9, 2 * head_dim).reshape(2, head_dim)
    neurons, values = [2, 5, 40], vector(10, 3)
    head_columns = [c for head in (1, 3) for c in range(head * head_dim, (head + 1) * head_dim)]
    shift = torch.zeros(num_heads * head_dim)
    shift[head_columns] = heads_shift.flatten()
    gen = {"prompt": "none", "generation": "all"}
    last = {"prompt": {"positions": [-1]}, "generation": "all"}
    ring = torch.cat([torch.stack([(torch.arange(5) * 1.2566).cos(), (torch.arange(5) * 1.2566).sin()], 1) * 4,
                      vector(11, 5).reshape(5, 1)], dim=1)
    heads_norm, neuron_norm = vector(14, num_heads * head_dim).abs() + 0.1, vector(15, d_ff).abs() + 0.1
    rows = vector(12, 24 * d).reshape(24, d)
    sae = {"encoder": (rows * 2 / d**0.5).tolist(), "encoder_bias": vector(13, 24, 0.5).tolist(),
           "decoder": (rows * 0.5 * scale).tolist(), "decoder_bias": w.tolist()}
    features = (rows * 2 / d**0.5, vector(13, 24, 0.5), rows * 0.5 * scale)
    head_rows = vector(15, 24 * num_heads * head_dim).reshape(24, -1)
    head_features = (head_rows * 2 / d**0.5, vector(16, 24, 0.5), head_rows * 0.5)
    of_heads = {"encoder": head_features[0].tolist(), "encoder_bias": head_features[1].tolist(),
                "decoder": head_features[2].tolist(), "decoder_bias": [0.0] * (num_heads * head_dim)}
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
          for n in range(num_layers) for site in ("resid_pre", "attn_out", "mlp_out")]),
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
        # Features by their own rows, and by the largest of all.
        ([{"op": "sae", "layers": [1], "inline": {**sae, "threshold": [0.2] * 24}, "options": {"features": {
            "3": {"set": 2.0}, "7": {"scale": 0.0}, "20": {"add": 1.5}}}},
          {"op": "sae", "site": "mlp_out", "layers": [2], "inline": {**sae, "k": 6}, "scope": gen, "options": {
              "features": {"5": {"add": 1.0}, "11": {"scale": 3.0}}}}],
         [ref.Edit("resid_post", 1, ref.features_changed(*features, {
             3: lambda f: 0 * f + 2, 7: lambda f: 0 * f, 20: lambda f: f + 1.5}, 0.2), ref.everywhere),
          ref.Edit("mlp_out", 2, ref.features_changed(*features, {5: lambda f: f + 1, 11: lambda f: 3 * f}, k=6),
                   ref.generated_only)]),
        # What heads write, edited by features, and a reconstruction in the place of an activation.
        ([{"op": "sae", "site": "head_out", "layers": [1], "inline": {**of_heads, "threshold": [0.2] * 24}, "options": {
            "features": {"3": {"set": 2.0}, "7": {"scale": 0.0}}}},
          {"op": "sae", "layers": [2], "inline": {**sae, "k": 6}, "scope": gen, "options": {
              "features": {"5": {"add": 1.0}}, "error": "drop"}}],
         [ref.Edit("head_out", 1, ref.features_changed(*head_features, {3: lambda f: 0 * f + 2, 7: lambda f: 0 * f},
                                                       0.2), ref.everywhere),
          ref.Edit("resid_post", 2, ref.features_changed(*features, {5: lambda f: f + 1}, k=6, centre=w),
                   ref.generated_only)]),
        # The least of each token's channels at every layer, and others by thresholds behind the prompt.
        ([{"op": "sparsify", "options": {"method": "magnitude", "share": 0.5}},
          {"op": "sparsify", "site": "head_out", "layers": [1], "inline": {"norm": heads_norm.tolist()},
           "options": {"method": "wina", "share": 0.25}},
          {"op": "sparsify", "layers": [2], "scope": gen, "options": {"method": "chess", "share": 0.5}, "inline": {
              "norm": neuron_norm.tolist(), "shares": [0.25, 0.75], "cut": [0.01, 0.05]}}],
         [*(ref.Edit("mlp_act", n, ref.small_left_out(0.5, torch.ones(d_ff)), ref.everywhere)
            for n in range(num_layers)),
          ref.Edit("head_out", 1, ref.small_left_out(0.25, heads_norm), ref.everywhere),
          ref.Edit("mlp_act", 2, ref.under_left_out(0.03 / neuron_norm), ref.generated_only)]),
        # The order matters: patch within a subspace, then add, then ablate, all at one site.
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


def moe_cases(d: int, scale: float = 1.0) -> list[Case]:
    """The five expert modes at both mixture layers (0 and 2), alone and stacked with a vector."""
    v = vector(1, d, 3 * scale)
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
