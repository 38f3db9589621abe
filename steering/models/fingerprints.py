"""The fingerprint of a loaded model: which weights an artifact was made on."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL_HASH_LIMIT_NUMBERS = 2**30
SAMPLE_CHUNKS = 64
SAMPLE_CHUNK_NUMBERS = 2048

# Configuration that changes what the same weights compute, by the names that the known families use for it. Few and
# stable on purpose: hashing the whole configuration would change the fingerprint with every release of transformers.
_ESSENTIALS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "hidden_act", "hidden_activation", "activation_function", "use_parallel_residual", "num_experts_per_tok",
    "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "topk_method", "sliding_window",
)


def fingerprint(model: "PreTrainedModel") -> str:
    """SHA-256 (64 hex digits) over the configuration's essentials and every weight: name, shape, numbers.

    Numbers are hashed as bfloat16, so that one checkpoint loaded in float32 here and in bfloat16 there is one model.
    Models over 2**30 numbers are sampled: of each large tensor, 64 chunks of 2048 numbers at equal distances, the first
    and the last among them. Any training changes some of those; a deliberate change of single weights between
    them is not noticed.
    """
    digest = hashlib.sha256()
    config: Any = model.config
    digest.update(json.dumps({name: getattr(config, name, None) for name in _ESSENTIALS}, sort_keys=True).encode())
    state: dict[str, Tensor] = model.state_dict()
    sampled = sum(tensor.numel() for tensor in state.values()) > FULL_HASH_LIMIT_NUMBERS
    digest.update(b"sampled" if sampled else b"full")
    for name, tensor in sorted(state.items()):
        kind = "float" if tensor.is_floating_point() else str(tensor.dtype)
        digest.update(f"{name}|{kind}|{list(tensor.shape)}|".encode())
        numbers = tensor.detach().reshape(-1)
        numbers = _sample(numbers) if sampled else numbers
        if numbers.is_floating_point():
            numbers = numbers.to(torch.bfloat16)
        content: Any = numbers.contiguous().view(torch.uint8).cpu().numpy()
        digest.update(content)
    return digest.hexdigest()


def _sample(numbers: Tensor) -> Tensor:
    if numbers.numel() <= SAMPLE_CHUNKS * SAMPLE_CHUNK_NUMBERS:
        return numbers
    last = numbers.numel() - SAMPLE_CHUNK_NUMBERS
    starts = [last * n // (SAMPLE_CHUNKS - 1) for n in range(SAMPLE_CHUNKS)]
    return torch.cat([numbers[start:start + SAMPLE_CHUNK_NUMBERS] for start in starts])
