"""GGUF files of tiny random models, written with the gguf package as llama.cpp's converter lays them out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from tests.tiny import tiny

SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")
MERGES = ("a b", "ab c")
CHAT_TEMPLATE = "{% for message in messages %}<|begin|>{{ message['content'] }}<|end|>{% endfor %}"


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level tokenizers write bytes with."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [n for n in range(256) if n not in shown]
    return [chr(n) for n in shown] + [chr(256 + i) for i in range(len(hidden))]


TOKENS = [*SPECIAL, *byte_alphabet(), "ab", "abc"]


# Families whose queries and keys llama.cpp stores with the halves of a head taken in turns.
INTERLEAVED = ("llama",)


def tiny_llama(**overrides: Any) -> PreTrainedModel:
    return tiny_of("llama", **overrides)


def tiny_of(family: str, **overrides: Any) -> PreTrainedModel:
    """With the vocabulary of these files, and a width that blocks of quantised numbers fit into."""
    return tiny(family, vocab_size=len(TOKENS), bos_token_id=0, eos_token_id=1, pad_token_id=2, hidden_size=32,
                intermediate_size=64, **overrides)


def write_gguf(path: Path, model: PreTrainedModel, kind: str = "F32", architecture: str = "llama") -> Path:
    """kind: number format of the matrices. architecture: as the file names it; its tensors are named as those of the
    model's own."""
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[config.model_type], config.num_hidden_layers)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        numbers = tensor.float().numpy()
        for projection, count in heads.items():
            if config.model_type in INTERLEAVED and stem.endswith(projection):
                numbers = interleaved(numbers, count)
        written = f"{names.get_name(stem)}.{last}"
        if numbers.ndim == 2 and kind != "F32":
            writer.add_tensor(written, gguf.quantize(numbers, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(written, np.ascontiguousarray(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(numbers: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys in llama.cpp's order: halves of a head taken in turns."""
    rows, columns = numbers.shape
    return numbers.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def logits(model: Any, text: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([text])).logits[0].float()
    return found
