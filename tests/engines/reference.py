"""The same interventions as plain Hugging Face hooks, written without a line of `steering`.

Qwen3 and Qwen3-MoE module paths only. An `Edit` is a function of the activation `[T, width]` and a mask `[T]`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Edit:
    site: str
    layer: int
    function: Function
    touched: Callable[[int, int], list[bool]]


def logprobs(model: Any, token_ids: Sequence[int], prompt_length: int, edits: Sequence[Edit]) -> torch.Tensor:
    """Log-probabilities `[T, vocab]` of one sequence under the edits, in order."""
    handles = []
    for edit in edits:
        mask = torch.tensor(edit.touched(prompt_length, len(token_ids)))
        handles.append(_hook(model, edit, mask))
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


def _hook(model: Any, edit: Edit, mask: torch.Tensor) -> Any:
    block = model.model.layers[edit.layer]

    def changed(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return torch.where(mask[:, None], edit.function(flat), flat).reshape(x.shape)

    def pre(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

    def post(module: Any, args: Any, output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    def gate(module: Any, args: Any, output: Any) -> Any:
        logits, weights, experts = output
        dense = edit.function(logits)
        picked, chosen = dense.topk(weights.shape[-1], dim=-1)
        return (logits, torch.where(mask[:, None], picked.to(weights.dtype), weights),
                torch.where(mask[:, None], chosen, experts))

    if edit.site == "resid_pre":
        return block.register_forward_pre_hook(pre, with_kwargs=True)
    if edit.site == "resid_post":
        return block.register_forward_hook(post)
    if edit.site == "attn_out":
        return block.self_attn.register_forward_hook(post)
    if edit.site == "mlp_out":
        return block.mlp.register_forward_hook(post)
    if edit.site == "head_out":
        return block.self_attn.o_proj.register_forward_pre_hook(pre, with_kwargs=True)
    if edit.site == "mlp_act":
        return block.mlp.down_proj.register_forward_pre_hook(pre, with_kwargs=True)
    if edit.site == "router":
        return block.mlp.gate.register_forward_hook(gate)
    raise ValueError(edit.site)


def everywhere(prompt: int, total: int) -> list[bool]:
    return [True] * total


def generated_only(prompt: int, total: int) -> list[bool]:
    return [t >= prompt for t in range(total)]


def last_prompt_and_generated(prompt: int, total: int) -> list[bool]:
    return [t >= prompt - 1 for t in range(total)]


def prompt_window(start: int, stop: int) -> Callable[[int, int], list[bool]]:
    return lambda prompt, total: [start <= t < min(stop, prompt) for t in range(total)]


def add(v: torch.Tensor) -> Function:
    return lambda h: h + v


def add_norm_match(v: torch.Tensor, c: float) -> Function:
    return lambda h: h + c * h.norm(dim=-1, keepdim=True) * (v / v.norm())


def add_keep_norm(v: torch.Tensor) -> Function:
    def function(h: torch.Tensor) -> torch.Tensor:
        moved = h + v
        return moved / moved.norm(dim=-1, keepdim=True) * h.norm(dim=-1, keepdim=True)

    return function


def project_out(basis: torch.Tensor) -> Function:
    projector = basis.T @ basis
    return lambda h: h - h @ projector


def clip_along(v: torch.Tensor, low: float, high: float) -> Function:
    u = v / v.norm()
    return lambda h: h + ((h @ u).clamp(low, high) - h @ u)[:, None] * u


def turn_to(plane: torch.Tensor, degrees: float) -> Function:
    def function(h: torch.Tensor) -> torch.Tensor:
        inside = h @ plane.T
        angle = math.radians(degrees)
        target = torch.tensor([math.cos(angle), math.sin(angle)])
        return h - inside @ plane + inside.norm(dim=-1, keepdim=True) * (target @ plane)

    return function


def low_rank(up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor) -> Function:
    return lambda h: h + (h @ down.T + bias) @ up


def flip_away(dims: torch.Tensor, signs: torch.Tensor) -> Function:
    def function(h: torch.Tensor) -> torch.Tensor:
        out = h.clone()
        part = h[:, dims]
        out[:, dims] = torch.where(part.sign() == signs, -part, part)
        return out

    return function


def set_columns(columns: Sequence[int], values: torch.Tensor) -> Function:
    def function(h: torch.Tensor) -> torch.Tensor:
        out = h.clone()
        out[:, list(columns)] = values
        return out

    return function


def scale_columns(columns: Sequence[int], factor: float) -> Function:
    def function(h: torch.Tensor) -> torch.Tensor:
        out = h.clone()
        out[:, list(columns)] *= factor
        return out

    return function


def replace_by(u: torch.Tensor, basis: torch.Tensor | None = None) -> Function:
    if basis is None:
        return lambda h: u.expand_as(h)
    return lambda h: h + (u - h) @ basis.T @ basis


def closed_spline(points: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """The periodic cubic spline through `points [w, r]` at 0, 1, ..."""
    around = torch.cat([points, points[:1]]).double().numpy()
    spline = CubicSpline(range(len(around)), around, bc_type="periodic")
    return lambda place: torch.from_numpy(spline(place)).float()


def swap_part(basis: torch.Tensor, mean: torch.Tensor, goal: torch.Tensor) -> Function:
    return lambda h: h + (goal - (h - mean) @ basis.T) @ basis


def shift_part(basis: torch.Tensor, mean: torch.Tensor, points: torch.Tensor, places: float) -> Function:
    """Each token's part in the subspace goes `places` on from the nearest of 256 points of the closed spline."""
    spline, grid = closed_spline(points), np.arange(256) * len(points) / 256

    def function(h: torch.Tensor) -> torch.Tensor:
        part = (h - mean) @ basis.T
        nearest = torch.cdist(part.double(), spline(grid).double()).argmin(dim=1).numpy()
        return h + (spline((grid[nearest] + places) % len(points)) - part) @ basis

    return function


def features_changed(encoder: torch.Tensor, bias: torch.Tensor, decoder: torch.Tensor, changes: dict[int, Function],
                     threshold: float = 0.0, k: int | None = None, centre: torch.Tensor | None = None) -> Function:
    """An SAE encodes, the features are changed, and what the change decodes to is added: the edited reconstruction and
    the error of the plain one. With the decoder's bias `centre` it is the edited reconstruction alone."""

    def function(h: torch.Tensor) -> torch.Tensor:
        pre = h @ encoder.T + bias
        features = pre.relu() * (pre > threshold)
        if k is not None:
            kept = torch.zeros_like(pre).scatter(-1, pre.topk(k, dim=-1).indices, 1.0)
            features = features * kept
        edited = features.clone()
        for index, change in changes.items():
            edited[:, index] = change(features[:, index])
        error = h - features @ decoder if centre is None else centre
        return edited @ decoder + error

    return function


def small_left_out(share: float, weight: torch.Tensor) -> Function:
    """Token by token, the channels with the smallest |h| weight are zero."""

    def function(h: torch.Tensor) -> torch.Tensor:
        out = h.clone()
        for token in out:
            token[(token.abs() * weight).sort().indices[:int(share * len(token))]] = 0
        return out

    return function


def under_left_out(cut: torch.Tensor) -> Function:
    """Channels whose size is not over their cut are zero."""
    return lambda h: h * (h.abs() > cut)


def experts(mode: str, listed: Sequence[int], k: int, number: float = 0.0) -> Function:
    """Dense gate weights `[T, E]` of a softmax router that normalises its top k, under one expert mode."""

    def function(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone().float()
        index = list(listed)
        if mode == "off_refill":
            logits[:, index] = -1e9
        if mode == "bias":
            logits[:, index] += number
        if mode == "force":
            logits[:, index] = logits.max(dim=-1, keepdim=True).values + 0.01
        probs = logits.softmax(-1)
        cut = probs.topk(k, dim=-1).values[:, -1:]
        dense = torch.where(probs >= cut, probs, torch.zeros_like(probs))
        dense = dense / dense.sum(-1, keepdim=True)
        if mode in ("off", "scale"):
            was = dense.clone()
            dense[:, index] *= number
            total = dense.sum(-1, keepdim=True)
            dense = torch.where(total > 0, dense / total.clamp_min(1e-30) * was.sum(-1, keepdim=True), dense)
            # Weights of selected experts that became 0 must still be listed: top-k below keeps the k largest entries,
            # and a zero entry contributes nothing whichever expert it names.
        return dense

    return function
