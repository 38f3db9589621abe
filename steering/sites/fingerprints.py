"""The fingerprint of a loaded model: which weights an artifact was made on."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL_HASH_LIMIT_BYTES = 2 * 1024**3
SAMPLE_CHUNKS = 64
SAMPLE_CHUNK_BYTES = 4096

# Configuration that changes what the same weights compute, by the names that the known families use for it. Few and
# stable on purpose: hashing the whole configuration would change the fingerprint with every release of transformers.
_ESSENTIALS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "hidden_act", "hidden_activation", "activation_function", "use_parallel_residual", "num_experts_per_tok",
    "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "topk_method", "sliding_window",
)


def fingerprint(model: "PreTrainedModel") -> str:
    """SHA-256 (64 hex digits) over the configuration's essentials and every weight: name, dtype, shape, bytes.

    Models over 2 GiB are sampled: of each tensor over 256 KiB, 64 chunks of 4 KiB at equal distances, the first and the
    last bytes among them. Any training touches those; a deliberate change of single weights between them is not seen.
    """
    digest = hashlib.sha256()
    config: Any = model.config
    digest.update(json.dumps({name: getattr(config, name, None) for name in _ESSENTIALS}, sort_keys=True).encode())
    state: dict[str, Tensor] = model.state_dict()
    sampled = sum(tensor.nbytes for tensor in state.values()) > FULL_HASH_LIMIT_BYTES
    digest.update(b"sampled" if sampled else b"full")
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        raw = tensor.detach().reshape(-1).view(torch.uint8)
        content: Any = (_sample(raw) if sampled else raw).cpu().numpy()
        digest.update(content)
    return digest.hexdigest()


def _sample(raw: Tensor) -> Tensor:
    if raw.numel() <= SAMPLE_CHUNKS * SAMPLE_CHUNK_BYTES:
        return raw
    last = raw.numel() - SAMPLE_CHUNK_BYTES
    starts = [last * n // (SAMPLE_CHUNKS - 1) for n in range(SAMPLE_CHUNKS)]
    return torch.cat([raw[start:start + SAMPLE_CHUNK_BYTES] for start in starts])
