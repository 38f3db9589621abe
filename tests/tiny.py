"""Tiny random models of every architecture family, for tests: two or three layers, seeded, float32, on the CPU."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from steering.models.families import FAMILIES as TABLE

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

# For a family of which nothing else is said below, as far as its configuration has these fields.
_ANY: dict[str, Any] = {**_GROUPED, "head_dim": 12, "num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2,
                        "moe_intermediate_size": 24}

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

# Every feature of a configuration that changes what a forward pass computes, switched on. It goes into each family that
# has the field; a field that is in none of the tables here fails a test, so that a new family brings its own along.
SWITCHES: dict[str, Any] = {
    "attention_bias": True, "mlp_bias": True, "qkv_bias": True, "tie_word_embeddings": True, "norm_topk_prob": True,
    "sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0, "clip_qkv": 0.5,
    "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "use_parallel_residual": False,
    "rope_interleave": False, "decoder_sparse_step": 2, "mlp_only_layers": [2],
    "original_max_position_embeddings": 64, "rope_parameters": {"rope_type": "linear", "factor": 2.0},
}
# Switches that need no other weights: turned off alone, they must show, or a test of them shows nothing.
BARE_SWITCHES = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv",
                 "scale_attn_by_inverse_layer_idx", "use_parallel_residual", "rope_interleave", "rope_parameters")
# Where one value does not do for all.
_SWITCHES_OF: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 64}},
    "qwen2": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "qwen3": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}},
    "gemma3_text": {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "gpt_neox": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5}},
    "phi3": {"rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.5, "short_factor": [1.5, 2.0],
                                 "long_factor": [3.0, 8.0], "original_max_position_embeddings": 64}},
    "deepseek_v2": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7,
                                        "original_max_position_embeddings": 64}},
    "deepseek_v3": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7,
                                        "original_max_position_embeddings": 64}},
}
# Fields that are sizes or ids, or that only training and other heads read.
PLAIN_FIELDS = frozenset("""
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings n_positions n_embd n_layer n_head n_inner hidden_act hidden_activation activation_function
    rms_norm_eps layer_norm_eps layer_norm_epsilon query_pre_attn_scalar pad_token_id bos_token_id eos_token_id
    num_experts num_local_experts n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size
    shared_expert_intermediate_size first_k_dense_replace n_group topk_group topk_method routed_scaling_factor
    q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim num_mtp_layers
    initializer_range use_cache pretraining_tp is_decoder scale_attn_weights add_cross_attention output_router_logits
    router_aux_loss_coef router_jitter_noise attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout
    classifier_dropout summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
""".split())
# Fields whose other value no causal engine can honour, and which a load refuses by name.
REFUSED_FIELDS = frozenset({"use_bidirectional_attention"})

FAMILIES: tuple[str, ...] = tuple(TABLE)
MOE_FAMILIES = tuple(name for name, family in TABLE.items() if family.router is not None)


def tiny(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model of `family` (a `config.model_type`) in eval mode; `overrides` are fields of its configuration."""
    own = _OWN[family] if family in _OWN else {name: v for name, v in _ANY.items() if name in fields_of(family)}
    config = AutoConfig.for_model(family, **{**_COMMON, **own, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _liven(model)
    return model


def fields_of(family: str) -> frozenset[str]:
    """Names of the fields that the configuration of `family` declares."""
    return frozenset(vars(CONFIG_MAPPING[family])["__annotations__"])


def everything(family: str) -> dict[str, Any]:
    """Overrides for `tiny` that switch on every feature the configuration of `family` has."""
    switches = {**SWITCHES, **_SWITCHES_OF.get(family, {})}
    return {name: value for name, value in switches.items() if name in fields_of(family)}


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
