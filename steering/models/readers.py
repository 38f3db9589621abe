"""What reads an activation: the names of the weights that a checkpoint has for it, and what a norm before them does.

An output projection reads `head_out` and `mlp_act`. Of the residual stream there are several readers: the attention and
the MLP of a block, and the unembedding, each behind a norm whose gain scales the dims.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from steering.language.errors import InvalidRequest, UnsupportedSite
from steering.language.vocabulary import Site
from steering.models.families import FAMILIES

RESIDUAL: tuple[Site, ...] = ("resid_pre", "resid_post")
NAME = re.compile(r"unembedding|(attention|mlp)\.([0-9]{1,4})")
# Families whose linear layers are stored [in, out], whose norms subtract the mean, and whose gains are 1 + weight.
TRANSPOSED, CENTRED, FROM_ONE = {"gpt2"}, {"gpt2", "gpt_neox"}, {"gemma2", "gemma3_text"}
_BEFORE = {"attention": ("input_layernorm", "ln_1"),
           "mlp": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")}
_FINAL = ("norm", "ln_f", "final_layer_norm")
_UNEMBEDDING = ("lm_head", "embed_out", "embed_tokens", "wte", "embed_in")


@dataclass(frozen=True)
class Reader:
    """weights: names of tensors `[out, width]`, which read together. gain: of the norm before them, `[width]`."""

    weights: tuple[str, ...]
    gain: str | None = None


def output_reader(family: str, site: Site, layer: int, names: Iterable[str]) -> Reader:
    """The output projection that reads `head_out` or `mlp_act`. Raises UnsupportedSite."""
    path = {"head_out": FAMILIES[family].head_out, "mlp_act": FAMILIES[family].mlp_act}.get(site)
    found = [] if path is None else [name for name in names if _of_block(name, family, layer) == f"{path}.weight"]
    if not found:
        raise UnsupportedSite(f"the checkpoint has no weights that read {site} of layer {layer}", param="site",
                              fix="Check a direction at mlp_act, head_out or in the residual stream.")
    return Reader((found[0],))


def residual_reader(family: str, name: str, names: Iterable[str]) -> Reader:
    """A reader of the residual stream by its name: "unembedding", "attention.3" or "mlp.3".

    Raises:
        InvalidRequest: there is none of that name, or no weights of it.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise InvalidRequest(f"there is no reader {name[:40]!r}", param="readers",
                             fix='Name "unembedding", "attention.LAYER" or "mlp.LAYER".')
    known = list(names)
    found = _unembedding(known) if match[1] is None else _of_part(family, match[1], int(match[2]), known)
    if not found.weights:
        raise InvalidRequest(f"the checkpoint has no weights of {name}", param="readers",
                             fix="Name a layer of the model; a mixture's experts are no readers.")
    return found


def _unembedding(names: list[str]) -> Reader:
    def ending(wanted: Iterable[str]) -> str | None:
        return next((name for end in wanted for name in names
                     if re.fullmatch(rf"([a-z_]+\.)?{end}\.weight", name)), None)

    weight = ending(_UNEMBEDDING)
    return Reader(() if weight is None else (weight,), ending(_FINAL))


def _of_part(family: str, part: str, layer: int, names: list[str]) -> Reader:
    described = FAMILIES[family]
    out = described.head_out if part == "attention" else described.mlp_act
    module = out.rpartition(".")[0]
    inside = {own: name for name in names if (own := _of_block(name, family, layer)) is not None}
    weights = [name for own, name in inside.items()
               if own.startswith(f"{module}.") and own.endswith(".weight") and own != f"{out}.weight"
               and "norm" not in own and own != f"{described.router}.weight" and ".experts." not in own]
    # Of families that normalise behind attention and MLP the names of those norms are taken.
    taken = {described.attn_out, described.mlp_out}
    gain = next((inside[f"{norm}.weight"] for norm in _BEFORE[part]
                 if norm not in taken and f"{norm}.weight" in inside), None)
    return Reader(tuple(sorted(weights)), gain)


def _of_block(name: str, family: str, layer: int) -> str | None:
    """The name of a tensor from its block on, None where it is not of that block."""
    found = re.fullmatch(rf"(?:[a-z_]+\.)*?{re.escape(FAMILIES[family].blocks)}\.{layer}\.(.+)", name)
    return None if found is None else found[1]
