"""The table of model families. What a family is stands here and nowhere else, and both engines read it.

A family is what transformers calls a `model_type`. To add one, add an entry: the tests run a tiny model of every entry
against plain Hugging Face hooks, at every site. Paths lead from a block to a module of it. They are read off the
family's own modelling code; a block that lacks a path does not have that site, as the dense blocks of a mixture lack a
router. `attn_out` and `mlp_out` name the modules whose output is added to the residual stream, which in families that
normalise after attention and MLP is the norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steering.language.vocabulary import Site
from steering.models.routing import RouterRule
from steering.models.rules import deepseek_v2_rule, deepseek_v3_rule, mixtral_rule, softmax_rule

# The sites whose activation tensor parallelism splits by columns, so that each rank sees its own part. At every other
# site all ranks see the whole activation.
SHARDED_SITES: frozenset[Site] = frozenset({"head_out", "mlp_act"})


@dataclass(frozen=True)
class Vllm:
    """How vLLM runs a family whose blocks take and return the residual stream in two halves.

    Attributes:
        mlp: vLLM's own name of the MLP, where it is not that of the table.
        ignored: fields of the configuration that vLLM 0.32 passes over in silence. A model that sets one is refused,
            because its answers would be wrong by 2 nats or more in a small random model.
    """

    mlp: str | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        name: `config.model_type`.
        blocks: path of the list of blocks, from the base model.
        attn_out, mlp_out: modules whose output is added to the residual stream.
        head_out: output projection of the attention; its input holds the heads side by side.
        mlp_act: down projection of a dense MLP; its input holds the neurons.
        router: gate of a mixture of experts, which returns (logits, weights, experts); None for dense families.
        rule: how that gate goes from logits to experts, given the gate.
        head_width: field of the configuration with the width of a head at `head_out`. A model without it has
            hidden_size / num_attention_heads.
        mlp_width: field of the configuration with the number of neurons. A model without it has 4 * hidden_size.
        vllm: how vLLM runs it; None where Trimtab does not hook vLLM's blocks of this family.
        not_embedded: why the embedded engine refuses it; None where it serves it.
    """

    name: str
    blocks: str = "layers"
    attn_out: str = "self_attn"
    mlp_out: str = "mlp"
    head_out: str = "self_attn.o_proj"
    mlp_act: str = "mlp.down_proj"
    router: str | None = None
    rule: Callable[[Any], RouterRule] = softmax_rule
    head_width: str = "head_dim"
    mlp_width: str = "intermediate_size"
    vllm: Vllm | None = None
    not_embedded: str | None = None


_POST_NORM: dict[str, Any] = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
_MIXTURE: dict[str, Any] = {"router": "mlp.gate"}
# DeepSeek's latent attention has values of another width than keys, and its output projection sees the values.
# The paged cache of transformers 5.19 gives both one width.
_LATENT: dict[str, Any] = {**_MIXTURE, "head_width": "v_head_dim", "not_embedded": "values of another width than keys"}

FAMILIES: dict[str, Family] = {family.name: family for family in (
    Family("llama", vllm=Vllm()),
    Family("mistral", vllm=Vllm()),
    Family("qwen2", vllm=Vllm()),
    Family("qwen3", vllm=Vllm(ignored=("attention_bias",))),  # the bias of the output projection
    Family("gemma2", **_POST_NORM),
    Family("gemma3_text", **_POST_NORM),
    Family("gpt2", blocks="h", attn_out="attn", head_out="attn.c_proj", mlp_act="mlp.c_proj", mlp_width="n_inner"),
    Family("gpt_neox", attn_out="attention", head_out="attention.dense", mlp_act="mlp.dense_4h_to_h"),
    Family("phi3", vllm=Vllm()),
    Family("olmo2", **_POST_NORM),
    Family("mixtral", **_MIXTURE, rule=mixtral_rule, vllm=Vllm(mlp="block_sparse_moe")),
    Family("qwen2_moe", **_MIXTURE, vllm=Vllm()),
    Family("qwen3_moe", **_MIXTURE, vllm=Vllm(ignored=("attention_bias",))),
    Family("olmoe", **_MIXTURE,
           vllm=Vllm(ignored=("attention_bias", "clip_qkv", "norm_topk_prob", "tie_word_embeddings"))),
    Family("deepseek_v2", **_LATENT, rule=deepseek_v2_rule),
    Family("deepseek_v3", **_LATENT, rule=deepseek_v3_rule),
)}


def known() -> str:
    """The names of all families, for messages."""
    return ", ".join(sorted(FAMILIES))
