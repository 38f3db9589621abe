"""The closed lists of the language: ops, sites, units, forms of reading, pools, directions and sections."""

from typing import Literal, get_args

# Each op stands in `steering/ops/`, in the file of its name.
Op = Literal["add", "ablate", "clamp", "rotate", "affine", "sign_flip", "mask", "neuron_mask", "head_mask",
             "expert_mask", "manifold", "patch", "sae", "sparsify"]
Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "head_out", "mlp_act", "router"]
Unit = Literal["raw", "unit", "rel", "sigma", "kl"]
Form = Literal["linear", "cosine", "cast", "agreement", "distance", "feature", "residual", "mahalanobis", "membership",
               "spectral", "diffusion"]
Pooling = Literal["mean", "max", "last"]
Direction = Literal["above", "below"]
Section = Literal["reasoning", "answer", "tool_call", "json"]
OPS: tuple[Op, ...] = get_args(Op)
SITES: tuple[Site, ...] = get_args(Site)
SECTIONS: tuple[Section, ...] = get_args(Section)
