"""The architectures, and writing a trained model as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lab.induction import lay_heads
from lab.paths import TOOLS_MODEL
from lab.tokenizer import BOS, END, EOS, PAD, TOOLS_CONTEXT, build_tokenizer, save_tokenizer

# initializer_range 0.08 and untied embeddings: with the usual 0.02 and tied embeddings the calendar
# and the in-context tasks stay at chance for tens of millions of tokens (issue 3).
_COMMON = dict(
    hidden_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
    max_position_embeddings=512, rms_norm_eps=1e-6, initializer_range=0.08,
    tie_word_embeddings=False, attention_bias=False, use_sliding_window=False, use_cache=True,
)
_DENSE = dict(intermediate_size=384)
# Tied, so that a head which copies one word copies all of them; it starts with such heads, which noise would drown.
_TOOLS = dict(intermediate_size=384, num_hidden_layers=4, max_position_embeddings=TOOLS_CONTEXT, head_dim=64,
              tie_word_embeddings=True, initializer_range=0.02)
_MOE = dict(
    intermediate_size=256, moe_intermediate_size=96, num_experts=16, num_experts_per_tok=2,
    decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, router_aux_loss_coef=0.01,
    output_router_logits=False,
)


def make_config(name: str, **changes: object) -> PretrainedConfig:
    """The configuration of a lab model; `changes` override single fields (tests)."""
    tok = build_tokenizer(name)
    ids = dict(
        vocab_size=-(-len(tok) // 64) * 64,  # rounded up: engines like aligned vocabularies
        bos_token_id=tok.convert_tokens_to_ids(BOS), eos_token_id=tok.convert_tokens_to_ids(EOS),
        pad_token_id=tok.convert_tokens_to_ids(PAD),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    if name == "lab-dense":
        return Qwen3Config(**{**_COMMON, **_DENSE, **ids, **changes})
    if name == TOOLS_MODEL:
        # Slow enough that a word is found again at any distance.
        slow = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        return Qwen3Config(**{**_COMMON, **_TOOLS, **ids, **slow, **changes})
    if name == "lab-moe":
        return Qwen3MoeConfig(**{**_COMMON, **_MOE, **ids, **changes})
    raise ValueError(f"no architecture is called {name!r}")


def new_model(name: str, seed: int, **changes: object) -> PreTrainedModel:
    """A freshly initialised fp32 model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(name, **changes), dtype=torch.float32)
    if name == TOOLS_MODEL:
        lay_heads(model)
    return model


def save_model(model: PreTrainedModel, folder: Path, name: str = "lab-dense") -> None:
    """Write the folder all at once: bf16 weights, configs, tokenizer, generation defaults."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    tok = build_tokenizer(name)
    half = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    half.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    half.config.dtype = torch.bfloat16
    half.save_pretrained(tmp)
    save_tokenizer(tmp, name)
    generation = {
        "bos_token_id": tok.convert_tokens_to_ids(BOS),
        "eos_token_id": [tok.convert_tokens_to_ids(END), tok.convert_tokens_to_ids(EOS)],
        "pad_token_id": tok.convert_tokens_to_ids(PAD),
    }
    (tmp / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    # Temporary folders and safetensors are private to their writer; a model is for everyone.
    tmp.chmod(0o755)
    for file in tmp.iterdir():
        file.chmod(0o644)
    old = folder.with_name(f".{folder.name}-old")
    if folder.exists():
        folder.rename(old)
    tmp.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_model(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """The committed (rounded) weights, computed in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()
