"""Tiny random models of every architecture family, for tests: two or three layers, seeded, float32, on the CPU."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 97

_COMMON = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}
_GROUPED = {"num_key_value_heads": 2}
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}

_OWN: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None, "head_dim": 12},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 12},
    "gemma2": {**_GROUPED, "head_dim": 12, "sliding_window": 64, "query_pre_attn_scalar": 12},
    "gemma3_text": {**_GROUPED, "head_dim": 12, "sliding_window": 64, "query_pre_attn_scalar": 12},
    "gpt2": {"n_inner": 56},
    "gpt_neox": {},
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "mixtral": {**_GROUPED, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {**_GROUPED, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    "qwen3_moe": {**_GROUPED, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "norm_topk_prob": True, "mlp_only_layers": [1], "head_dim": 8},
    "olmoe": {**_GROUPED, "num_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_LATENT, "norm_topk_prob": True},
}

FAMILIES: tuple[str, ...] = tuple(_OWN)
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")


def tiny(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model of `family` (a `config.model_type`) in eval mode; `overrides` are fields of its configuration."""
    config = AutoConfig.for_model(family, **{**_COMMON, **_OWN[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _liven(model)
    return model


@torch.no_grad()
def _liven(model: PreTrainedModel) -> None:
    """Give norms, biases and router corrections, which start as constants, values that a test would notice."""
    # Tokens must differ in the stream for routers to tell them apart.
    model.get_input_embeddings().weight.mul_(6.0)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            parameter.normal_(std=0.1)
        elif parameter.ndim == 1 and "inv_freq" not in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
