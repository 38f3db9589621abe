"""Every op as the formula of its definition, for the reference of `trimtab verify`. Nothing in here uses `steering`.

Each function returns a change of the activations `h [T, width]`. `c` is the strength: a factor on what is added, or the
share of the change that is carried out.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from server.verify.hooks import Function

SAMPLED = 256


def add(v: Tensor, c: float) -> Function:
    return lambda h: h + c * v


def add_norm_match(v: Tensor, c: float) -> Function:
    return lambda h: h + c * h.norm(dim=-1, keepdim=True) * (v / v.norm())


def add_preserve_norm(v: Tensor, c: float) -> Function:
    def function(h: Tensor) -> Tensor:
        moved = h + c * v
        return moved * h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)

    return function


def ablate(basis: Tensor, c: float) -> Function:
    """basis: orthonormal rows `[r, width]`."""
    return lambda h: h - c * (h @ basis.T) @ basis


def clamp(v: Tensor, low: float, high: float, c: float) -> Function:
    u = v / v.norm()
    return lambda h: h + c * ((h @ u).clamp(low, high) - h @ u)[:, None] * u


def rotate(plane: Tensor, degrees: float, by: bool) -> Function:
    """Set the angle within the plane `[2, width]`, or turn by it."""

    def function(h: Tensor) -> Tensor:
        x, y = (h @ plane.T).unbind(-1)
        angle = torch.full_like(x, math.radians(degrees)) + (torch.atan2(y, x) if by else 0.0)
        new = torch.stack([angle.cos(), angle.sin()], -1) * torch.hypot(x, y)[:, None]
        return h + (new - h @ plane.T) @ plane

    return function


def affine(up: Tensor, down: Tensor, bias: Tensor, c: float) -> Function:
    return lambda h: h + c * (h @ down.T + bias) @ up


def diagonal(scale: Tensor, shift: Tensor, c: float) -> Function:
    return lambda h: (1 - c) * h + c * (scale * h + shift)


def sign_flip(dims: Sequence[int], signs: Tensor, mode: str, c: float) -> Function:
    """The listed dims whose sign agrees with `signs` (away), disagrees (toward), or all of them (flip)."""

    def function(h: Tensor) -> Tensor:
        out, part = h.clone(), h[:, list(dims)]
        chosen = {"away": part.sign() == signs, "toward": part.sign() == -signs, "flip": part == part}[mode]
        out[:, list(dims)] = torch.where(chosen, (1 - 2 * c) * part, part)
        return out

    return function


def columns_to(columns: Sequence[int], target: Callable[[Tensor], Tensor], c: float) -> Function:
    """Masks: the listed columns go to `target` of what they are."""

    def function(h: Tensor) -> Tensor:
        out, part = h.clone(), h[:, list(columns)]
        out[:, list(columns)] = part + c * (target(part) - part)
        return out

    return function


def features(encoder: Tensor, bias: Tensor, decoder: Tensor, changes: Mapping[int, Callable[[Tensor], Tensor]],
             c: float, k: int | None = None, centre: Tensor | None = None) -> Function:
    """Features of an SAE changed, by a plain encoding and decoding of all of them and the error between; with the
    decoder's bias `centre` without the error."""

    def function(h: Tensor) -> Tensor:
        pre = h @ encoder.T + bias
        least = 0.0 if k is None else pre.sort(dim=-1).values[:, -k][:, None]
        value = torch.where(pre >= least, pre, 0.0).relu()
        edited = value.clone()
        for index, change in changes.items():
            edited[:, index] = change(value[:, index])
        error = h - value @ decoder if centre is None else centre
        return (1 - c) * h + c * (edited @ decoder + error)

    return function


def small_left_out(share: float, weight: Tensor, c: float) -> Function:
    """Of each token the channels with the smallest |h| weight, sorted one token after the other."""

    def function(h: Tensor) -> Tensor:
        out = h.clone()
        for token in out:
            order = (token.abs() * weight).sort().indices
            token[order[:int(share * len(token))]] *= 1 - c
        return out

    return function


def patch(u: Tensor, c: float, basis: Tensor | None = None) -> Function:
    if basis is None:
        return lambda h: h + c * (u - h)
    return lambda h: h + c * ((u - h) @ basis.T) @ basis


def move_to(basis: Tensor, mean: Tensor, goal: Tensor, c: float) -> Function:
    """Put the part of each token within the subspace on one point of it."""
    return lambda h: h + c * (goal - (h - mean) @ basis.T) @ basis


def move_along(basis: Tensor, mean: Tensor, points: Tensor, places: float, c: float) -> Function:
    """Put it `places` further on the closed curve than the sampled point of the curve that is nearest to it."""
    grid = np.arange(SAMPLED) * len(points) / SAMPLED
    curve = closed_curve(points)
    there, further = curve(grid), curve((grid + places) % len(points))

    def function(h: Tensor) -> Tensor:
        part = (h - mean) @ basis.T
        nearest = (part.double()[:, None] - there).square().sum(-1).argmin(-1)
        return h + c * (further[nearest].float() - part) @ basis

    return function


def closed_curve(points: Tensor) -> Callable[[np.ndarray], Tensor]:
    """The periodic cubic spline through `points [w, r]` at 0, 1, ..., w - 1 and again at w."""
    p = points.double().cpu().numpy()
    number = len(p)
    # Slopes that make the second derivative continuous: m[i-1] + 4 m[i] + m[i+1] = 3 (p[i+1] - p[i-1]), all round.
    eye = np.eye(number)
    system = 4 * eye + np.roll(eye, 1, 1) + np.roll(eye, -1, 1)
    slopes = np.linalg.solve(system, 3 * (np.roll(p, -1, 0) - np.roll(p, 1, 0)))

    def at(where: np.ndarray) -> Tensor:
        i = np.floor(where).astype(int)
        t = (where - i)[:, None]
        i, j = i % number, (i + 1) % number
        return torch.from_numpy((2 * t**3 - 3 * t**2 + 1) * p[i] + (t**3 - 2 * t**2 + t) * slopes[i]
                                + (3 * t**2 - 2 * t**3) * p[j] + (t**3 - t**2) * slopes[j])

    return at


def experts(listed: Sequence[int], mode: str, number: float) -> Function:
    """From router logits `[T, E]` to dense gate weights `[T, E]`, given the gate's own rule for that way."""
    index = list(listed)

    def function(logits: Tensor, choose: Function) -> Tensor:
        logits = logits.clone()
        if mode == "off_refill":
            logits[:, index] = -1e9
        if mode == "bias":
            logits[:, index] += number
        if mode == "force":
            logits[:, index] = logits.max(-1, keepdim=True).values + 0.01
        weights = choose(logits)
        if mode in ("off", "scale"):
            before = weights.sum(-1, keepdim=True)
            weights[:, index] *= number
            after = weights.sum(-1, keepdim=True)
            weights = torch.where(after > 0, weights * before / after.clamp_min(1e-30), weights)
        return weights

    return function
