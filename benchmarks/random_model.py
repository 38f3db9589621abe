"""A random Llama for benchmarks that need real widths: about 100 M parameters at 768 x 12, in bfloat16."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lab import model_path


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """Random weights with the tokenizer of a lab model: the load generator needs words."""
    lab = model_path("lab-dense")
    vocab_size = json.loads((lab / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 4, num_hidden_layers=layers,
                         num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, vocab_size=vocab_size,
                         max_position_embeddings=1152, initializer_range=0.03, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lab / name, folder)
