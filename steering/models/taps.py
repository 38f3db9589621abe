"""Reaching a site of a loaded model: where it is, and hooks that put an edit there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steering.language.errors import UnsupportedSite
from steering.language.vocabulary import SITES, Site
from steering.models.blocks import block_of, blocks_of, family_of, find
from steering.models.routers import attach_router, router_rule
from steering.models.routing import Routing, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Side = Literal["input", "output"]
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tap:
    """Where a site of one layer lives: the activation passes through `module` as its input or output.

    It is the first input or output of that module, `[..., width]`. At the router it is the raw logits, `[T, E]`. They
    can be read here, but not changed to any effect, because the experts have been chosen already.
    """

    module: nn.Module
    side: Side


def tap(model: "PreTrainedModel", site: Site, layer: int) -> Tap:
    """Where `site` of block `layer` lives.

    Raises:
        UnsupportedModel: unknown family.
        LayerOutOfRange: no such layer.
        UnsupportedSite: this layer has no such site (the neurons of a mixture layer, the router of a dense one).
    """
    found = _find_tap(model, site, layer)
    if found is None:
        raise UnsupportedSite(f"layer {layer} of this {family_of(model).name} model has no site {site}", param="site",
                              fix="See GET /v1/capabilities.")
    return found


def offered_sites(model: "PreTrainedModel") -> dict[Site, tuple[int, ...]]:
    """The layers that have each site, by structure; sites that no layer has are left out."""
    layers = range(len(blocks_of(model)))
    offer = {site: tuple(n for n in layers if _find_tap(model, site, n) is not None) for site in SITES}
    return {site: found for site, found in offer.items() if found}


def attach(model: "PreTrainedModel", site: Site, layer: int, edit: Edit, *, first: bool = False) -> RemovableHandle:
    """Call `edit` with the activation at `site` of block `layer` in every forward pass, and put back what it returns.

    `edit` gets all tokens of the pass as one `[num_tokens, width]` tensor, whatever the batch looks like, and must not
    write into it. Returning that very tensor leaves the pass untouched, bit for bit. At the router it gets the raw
    logits, and experts are chosen anew from those it returns; use `attach_router` to edit the choice itself.

    Args:
        first: before the hooks that are there already, so that those which read see what this one leaves.

    Raises:
        UnsupportedModel, LayerOutOfRange, UnsupportedSite: as `tap`.
    """
    where = tap(model, site, layer)
    if site == "router":
        rule = router_rule(model, layer)

        def on_router(hidden: Tensor, routing: Routing) -> Routing | None:
            logits = edit(routing.logits)
            return None if logits is routing.logits else select(logits.to(routing.logits.dtype), rule)

        return attach_router(model, layer, on_router)
    if where.side == "input":
        return where.module.register_forward_pre_hook(_input_hook(edit), with_kwargs=True, prepend=first)
    return where.module.register_forward_hook(_output_hook(edit), prepend=first)


def _find_tap(model: "PreTrainedModel", site: Site, layer: int) -> Tap | None:
    family = family_of(model)
    block = block_of(model, layer)
    path: str | None
    side: Side = "output"
    match site:
        case "resid_pre":
            return Tap(block, "input")
        case "resid_post":
            return Tap(block, "output")
        case "attn_out":
            path = family.attn_out
        case "mlp_out":
            path = family.mlp_out
        case "head_out":
            path, side = family.head_out, "input"
        case "mlp_act":
            path, side = family.mlp_act, "input"
        case "router":
            path = family.router
    module = find(block, path) if path is not None else None
    return Tap(module, side) if module is not None else None


def _apply(edit: Edit, activation: Tensor) -> Tensor | None:
    """What takes the activation's place, in its own shape and dtype, or None to leave it."""
    flat = activation.reshape(-1, activation.shape[-1])
    edited = edit(flat)
    return None if edited is flat else edited.to(activation.dtype).reshape(activation.shape)


def _input_hook(edit: Edit) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Families differ in whether the block's hidden states come by position or by name.
        edited = _apply(edit, args[0] if args else kwargs["hidden_states"])
        if edited is None:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    return hook


def _output_hook(edit: Edit) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            edited = _apply(edit, output[0])
            return None if edited is None else (edited, *output[1:])
        return _apply(edit, output)

    return hook
