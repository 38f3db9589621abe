"""The sites that can be hooked in vLLM's model. Settings name them, so this imports nothing that loads torch."""

from steering.language.vocabulary import Site

ALL_SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out", "head_out", "mlp_act", "router", "resid_post")
