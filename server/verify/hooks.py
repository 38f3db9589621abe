"""The reference of `trimtab verify`: a stock Hugging Face model with plain forward hooks.

Nothing in here uses `steering`. The sites are found by the names that the families of transformers give their modules,
and `check_places` proves by addition that the modules found are the right ones.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steering.language.errors import UnsupportedModel

# Of the activation; at the router of the logits and of the gate's own rule, and the result are dense gate weights.
Function = Callable[..., Tensor]
Touched = Callable[[int, int], list[bool]]
ATTENTION = ("self_attn", "attn", "attention")
OUTPUT = ("o_proj", "c_proj", "dense")
DOWN = ("down_proj", "c_proj", "dense_4h_to_h")
# Relative error of a sum that float32 takes in another order.
CLOSE = 1e-3


@dataclass(frozen=True)
class Edit:
    """A change of the activation `[T, width]` at one site of one layer, which is handed over in float32 on the CPU.

    touched: from the lengths of the prompt and of the whole text to one flag per token.
    """

    site: str
    layer: int
    function: Function
    touched: Touched


@dataclass(frozen=True)
class Where:
    """A module, and whether the activation is what goes into it or what comes out of it."""

    module: nn.Module
    output: bool


@torch.no_grad()
def logprobs(model: Any, token_ids: Sequence[int], prompt_length: int, variants: Sequence[Sequence[Edit]]) -> Tensor:
    """Log-probabilities `[variants, T, vocab]` of one text under each list of edits, in the order of the list."""
    handles = [_attach(model, row, len(variants), edit, torch.tensor(edit.touched(prompt_length, len(token_ids))))
               for row, edits in enumerate(variants) for edit in edits]
    try:
        batch = torch.tensor([list(token_ids)] * len(variants), device=model.device)
        logits: Tensor = model(input_ids=batch, use_cache=False).logits
        return logits.float().log_softmax(-1).cpu()
    finally:
        for handle in handles:
            handle.remove()


def place(model: Any, site: str, layer: int) -> Where:
    """Where the site of a layer is.

    Raises:
        UnsupportedModel: the block has no module of the names that are known.
    """
    block = _blocks(model)[layer]
    normed_after = hasattr(block, "post_feedforward_layernorm")
    attention = _child(block, ATTENTION)
    match site:
        case "resid_pre":
            return Where(block, False)
        case "resid_post":
            return Where(block, True)
        case "attn_out":
            return Where(block.post_attention_layernorm if normed_after else attention, True)
        case "mlp_out":
            return Where(block.post_feedforward_layernorm if normed_after else _child(block, ("mlp",)), True)
        case "head_out":
            return Where(_child(attention, OUTPUT), False)
        case "mlp_act":
            return Where(_child(_child(block, ("mlp",)), DOWN), False)
        case "router":
            return Where(_child(_child(block, ("mlp",)), ("gate",)), True)
    raise ValueError(f"there is no site {site}")


@torch.no_grad()
def check_places(model: Any, token_ids: Sequence[int]) -> None:
    """Prove on one text that what a block adds to the stream is what was found as `attn_out` and `mlp_out`.

    Raises:
        UnsupportedModel: in some layer the parts do not add up, so this reference would prove nothing.
    """
    for layer in range(len(_blocks(model))):
        seen: dict[str, Tensor] = {}

        def keep(site: str, into: dict[str, Tensor] = seen) -> Function:
            def function(h: Tensor) -> Tensor:
                into[site] = h.clone()
                return h

            return function

        logprobs(model, token_ids, len(token_ids), [[
            Edit(site, layer, keep(site), lambda prompt, total: [True] * total)
            for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")]])
        found = seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"]
        if float((found - seen["resid_post"]).abs().max()) > CLOSE * float(seen["resid_post"].abs().max()):
            raise UnsupportedModel(f"layer {layer}: the modules that verify takes for attention and MLP do not add up "
                                   "to what the block adds", param="model")


def _blocks(model: Any) -> Any:
    """The blocks: the one list of modules of the base model that is as long as the configuration says."""
    number = model.config.num_hidden_layers
    for child in model.base_model.children():
        if isinstance(child, nn.ModuleList) and len(child) == number:
            return child
    raise UnsupportedModel(f"{type(model).__name__} has no list of {number} blocks", param="model")


def _child(module: Any, names: Sequence[str]) -> Any:
    for name in names:
        if isinstance(getattr(module, name, None), nn.Module):
            return getattr(module, name)
    raise UnsupportedModel(f"{type(module).__name__} has none of {', '.join(names)}", param="model")


def _attach(model: Any, row: int, rows: int, edit: Edit, touched: Tensor) -> Any:
    """A hook that edits one row of a batch of equal texts."""
    where = place(model, edit.site, edit.layer)
    choose = _choosing(where.module) if edit.site == "router" else None

    def changed(x: Tensor, function: Function = edit.function) -> Tensor:
        # Families differ in whether tokens come as [rows, T] or as one long row.
        parts = x.reshape(rows, -1, x.shape[-1])
        out = parts.clone()
        new = function(parts[row].float().cpu()).to(x)
        out[row] = torch.where(touched.to(x.device)[:, None], new, parts[row])
        return out.reshape(x.shape)

    def pre(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

    def post(module: Any, args: Any, output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    def gate(module: Any, args: Any, output: Any) -> Any:
        logits, weights, experts = output
        new = edit.function(logits.reshape(rows, -1, logits.shape[-1])[row].float().cpu(), choose).to(weights.device)
        # Of the dense weights [T, E] the k largest are used.
        picked, chosen = new.topk(weights.shape[-1], dim=-1)
        mine = touched.to(logits.device)[:, None]
        weights, experts = weights.clone(), experts.clone()
        w, e = weights.reshape(rows, -1, weights.shape[-1]), experts.reshape(rows, -1, experts.shape[-1])
        w[row], e[row] = torch.where(mine, picked.to(w.dtype), w[row]), torch.where(mine, chosen, e[row])
        return logits, w.reshape(weights.shape), e.reshape(experts.shape)

    if edit.site == "router":
        return where.module.register_forward_hook(gate)
    if where.output:
        return where.module.register_forward_hook(post)
    return where.module.register_forward_pre_hook(pre, with_kwargs=True)


def _choosing(gate: Any) -> Callable[[Tensor], Tensor]:
    """The model's own way from router logits `[T, E]` to dense gate weights `[T, E]`: its gate with the identity for a
    weight, so that what it takes for hidden states are the logits themselves."""
    twin = copy.copy(gate)
    number = gate.weight.shape[0]
    identity = torch.eye(number, device=gate.weight.device)
    twin._parameters = {**gate._parameters, "weight": nn.Parameter(identity, requires_grad=False)}
    # The copy must not run the hooks of this reference again.
    twin._forward_hooks = {}
    twin.hidden_dim = number

    def choose(logits: Tensor) -> Tensor:
        _, weights, experts = twin(logits.to(identity.device))
        return torch.zeros_like(logits).scatter_(-1, experts.cpu(), weights.float().cpu())

    return choose
