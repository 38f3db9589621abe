"""Hooks on the modules of a model that vLLM has loaded, put there before its forward is traced.

vLLM's blocks hand the residual stream on in two halves, (hidden, residual), whose sum is the stream. Where a site lives
below a block stands in the table of families. What is not found there is not hooked, and a site that is not hooked is
not offered.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from server.engines.vllm.manifest import GraphOps
from server.engines.vllm.wire import Key
from server.engines.vllm.worker.ops import Actor, Split, register
from server.engines.vllm.worker.stage import poisoned, steered
from server.engines.vllm.worker.steps import Steps
from server.engines.vllm.worker.tables import GraphPlace, GraphTables
from steering.language.vocabulary import Site
from steering.models.blocks import find
from steering.models.families import SHARDED_SITES, Family
from steering.models.routing import RouterRule

WHOLE = Split(0, 1)


class Hooks:
    """Hooks one model. `found` lists the places, in the order of their numbers."""

    def __init__(self, model: nn.Module, steps: Steps, graph: GraphTables, sites: tuple[Site, ...],
                 graph_sites: tuple[Site, ...], graph_ops: GraphOps, split: Split, d_model: int,
                 family: Family) -> None:
        self._steps, self._graph, self._d_model = steps, graph, d_model
        self._sites, self._graph_sites, self._graph_ops, self._split = sites, graph_sites, graph_ops, split
        self._family = family
        self.found: list[Key] = []
        for layer, block in blocks(model, family).items():
            self._block(layer, block)

    def _block(self, layer: int, block: nn.Module) -> None:
        family = self._family
        assert family.vllm is not None
        attention, mlp = find(block, family.attn_out), find(block, family.vllm.mlp or family.mlp_out)
        assert attention is not None and mlp is not None
        if "resid_pre" in self._sites:
            edit = self._edit("resid_pre", layer, block)
            block.register_forward_pre_hook(_stream_input(edit), with_kwargs=True)
        if "attn_out" in self._sites:
            attention.register_forward_hook(_output(self._edit("attn_out", layer, attention)))
        if "mlp_out" in self._sites:
            mlp.register_forward_hook(_output(self._edit("mlp_out", layer, mlp)))
        projection = find(block, family.head_out)
        if "head_out" in self._sites and projection is not None:
            projection.register_forward_pre_hook(_input(self._edit("head_out", layer, projection)))
        down = find(block, family.mlp_act)
        if "mlp_act" in self._sites and down is not None:
            down.register_forward_pre_hook(_input(self._edit("mlp_act", layer, down)))
        if "router" in self._sites:
            self._router(layer, mlp)
        if "resid_post" in self._sites:
            block.register_forward_hook(_stream_output(self._edit("resid_post", layer, block)))

    def _edit(self, site: Site, layer: int, module: nn.Module) -> "Edit":
        key = (site, layer)
        split = self._split if site in SHARDED_SITES else WHOLE
        number = register(Actor(self._steps, key, split))
        self.found.append(key)
        place = None
        # Where the width is split among devices no rank sees how far a token is moved.
        if site in self._graph_sites and split.size == 1:
            local = self._width(module, split)
            elementwise = self._graph_ops == "vectors" or site in SHARDED_SITES
            place = self._graph.add_place(key, local, elementwise=elementwise,
                                          columns=split.columns(local * split.size))
            # Buffers, so that the compiled graph reads them where they are.
            for name, tensor in (("token", self._graph.token), ("pool", place.pool.tensor), ("index", place.index),
                                 ("scalars", place.scalars)):
                module.register_buffer(_buffer(site, name), tensor, persistent=False)
        return Edit(module, site, number, place, self._graph)

    def _width(self, module: nn.Module, split: Split) -> int:
        # A layer that takes adapters stands around the one that it was.
        size = getattr(getattr(module, "base_layer", module), "input_size_per_partition", None)
        return int(size) if size is not None and split is self._split else self._d_model

    def _router(self, layer: int, mlp: nn.Module) -> None:
        runner: Any = mlp._modules.get("experts")
        if runner is None or getattr(runner, "_fse_fuse_gate", False):
            return
        router: Any = getattr(runner, "router", None)
        rule = router_rule(router)
        if rule is None:
            return
        number = register(Actor(self._steps, ("router", layer), WHOLE, rule))
        compute = router._compute_routing

        def compute_routing(hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            weights, experts = compute(hidden_states, router_logits, *args, **kwargs)
            torch.ops.trimtab.route(router_logits, weights, experts, number)
            return weights, experts

        router._compute_routing = compute_routing
        self.found.append(("router", layer))


class Edit:
    """What happens at one place: first the part that lives in the graph, then the opaque op, which is told what steps
    the graph took."""

    def __init__(self, module: nn.Module, site: Site, number: int, place: GraphPlace | None, graph: GraphTables
                 ) -> None:
        self._module, self._site, self._number = module, site, number
        self._in_graph = place is not None
        self._elementwise = place is not None and place.elementwise
        self._depth, self._rank, self._limit, self._poisoning = graph.depth, graph.rank, graph.limit, graph.poisoning

    def __call__(self, h: Tensor, residual: Tensor | None) -> Tensor:
        taken = None
        if self._in_graph:
            token, pool, index, scalars = (getattr(self._module, _buffer(self._site, name))
                                           for name in ("token", "pool", "index", "scalars"))
            number = token[:h.shape[0]]
            x = h.float() if residual is None else h.float() + residual.float()
            y, taken = steered(x, pool, index[number], scalars[number], self._depth, self._rank, self._elementwise,
                               h.dtype, self._limit)
            if self._poisoning:
                y = poisoned(y, taken, self._limit)
            h = (y if residual is None else h.float() + (y - x)).to(h.dtype)
        torch.ops.trimtab.act(h, residual, taken, self._number)
        return h


def blocks(model: nn.Module, family: Family) -> dict[int, nn.Module]:
    """Blocks that live on this worker, by layer number."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] == family.blocks:
            return {i: block for i, block in enumerate(module) if find(block, family.attn_out) is not None}
    return {}


def router_rule(router: Any) -> RouterRule | None:
    """The rule of a plain softmax router; None for any other, whose layers then offer no router site."""
    plain = (getattr(router, "scoring_func", None) == "softmax" and not getattr(router, "use_grouped_topk", False)
             and getattr(router, "custom_routing_function", None) is None
             and getattr(router, "e_score_correction_bias", None) is None)
    if not plain:
        return None
    return RouterRule(router.global_num_experts, router.top_k, normalise=bool(router.renormalize),
                      weights_like_logits=False)


def _buffer(site: Site, name: str) -> str:
    return f"_trimtab_{site}_{name}"


def _stream_input(edit: Edit) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Blocks are called as (positions, hidden_states, residual), by place or by name.
        given = dict(zip(("positions", "hidden_states", "residual"), args, strict=False)) | kwargs
        given["hidden_states"] = edit(given["hidden_states"], given.get("residual"))
        return (), given

    return hook


def _stream_output(edit: Edit) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> Any:
        hidden, residual = output
        return edit(hidden, residual), residual

    return hook


def _output(edit: Edit) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return edit(output, None)

    return hook


def _input(edit: Edit) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (edit(args[0], None), *args[1:])

    return hook
