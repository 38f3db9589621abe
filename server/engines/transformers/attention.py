"""Attention that does what the model asks for: a cap on the scores where it has one, a refusal where it asks for more.

transformers' SDPA attention takes any keyword and drops those it does not know, among them the cap of Gemma 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from server.engines.transformers.packed import attend_packed, layout
from steering.language.errors import UnsupportedModel

NAME = "sdpa"
# Scores that are held at once, in elements: rows of queries are taken in parts of this size.
SCORES_AT_ONCE = 1 << 24
# What a model may hand to its attention: the arguments of SDPA, what the mask and the cache have seen to, and the cap.
KNOWN = frozenset("""
    dropout scaling is_causal position_bias cache softcap sliding_window position_ids cache_position use_cache
    cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k read_index write_index block_table logits_indices
    logits_processor_args output_attentions output_hidden_states output_router_logits return_dict
""".split())
APART = "trimtab_attends_apart"
_asked: set[str] | None = None


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              softcap: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """SDPA, except where scores are capped: `cap * tanh(scores / cap)` before the mask. The requests of a flat
    batch are attended to apart (`packed.py`) where their cache was given to `attend_apart`.

    Args:
        query: `[batch, heads, T, head_dim]`; keys and values `[batch, kv_heads, K, head_dim]`, or of this step alone
            where `cache` (paged) adds those of the steps before.

    Returns:
        `[batch, T, heads, head_dim]`, and no weights.
    """
    if _asked is not None:
        _asked.update(name for name, given in kwargs.items() if given is not None)
        if key.shape[-1] != value.shape[-1]:
            _asked.add("values of another width than keys")
    scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    cache = kwargs.get("cache")
    if attention_mask is not None and isinstance(cache, PagedAttentionCache) and getattr(cache, APART, False) and (
            kwargs.get("position_bias") is None):
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        given = layout(*(tuple(kwargs[name].tolist()) for name in ("cu_seq_lens_q", "cu_seq_lens_k")))
        attend = partial(_plain, scaling=scaling) if softcap is None else partial(_capped, scaling=scaling, cap=softcap)
        return attend_packed(query, key, value, attention_mask, given, attend), None
    if softcap is None:
        out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
        return out, None
    if isinstance(cache, PagedAttentionCache):
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    return _capped(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling,
                                        enable_gqa=query.shape[1] != key.shape[1])


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, cap: float) -> Tensor:
    batch, heads, rows, _ = query.shape
    columns = key.shape[2]
    key, value = (repeat_kv(x, heads // x.shape[1]) for x in (key, value))
    if mask is not None:
        mask = mask.expand(-1, -1, rows, -1)
    out = torch.empty(batch, heads, rows, value.shape[-1], dtype=value.dtype, device=value.device)
    step = max(1, SCORES_AT_ONCE // (batch * heads * columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scores = query[:, :, part] @ key.transpose(2, 3) * scaling
        scores = torch.tanh(scores / cap) * cap
        if mask is None:
            # transformers leaves out a mask that is causal and no more.
            seen = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
            scores = scores.masked_fill(~seen[part], torch.finfo(scores.dtype).min)
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[..., part, :], torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask[..., part, :]
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
        out[:, :, part] = weights @ value
    return out


def attend_apart(cache: PagedAttentionCache) -> None:
    """Have the requests of this cache read their own keys only. On a CPU, where this has been measured: an accelerator
    has to wait for the host to learn where each request begins."""
    setattr(cache, APART, torch.device(cache.device).type == "cpu")


def register() -> None:
    """Put it in the place of transformers' SDPA: the batching loop knows attention by that name only."""
    AttentionInterface.register(NAME, attention)


@torch.no_grad()
def check_attention(model: Any) -> None:
    """Run two tokens and see what the model asks of its attention.

    Raises:
        UnsupportedModel: something that is not done here, by its name.
    """
    with _recording() as asked:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    if unknown := sorted(asked - KNOWN):
        raise UnsupportedModel(f"the attention of {model.config.model_type} asks for {', '.join(unknown)}, which the "
                               "embedded engine does not do", param="model",
                               fix="Serve it with the vLLM engine, if that knows the family.")


@contextmanager
def _recording() -> Iterator[set[str]]:
    global _asked
    _asked = set()
    try:
        yield _asked
    finally:
        _asked = None
