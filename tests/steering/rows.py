"""What a row does to a token, written down in numpy and without a line of `steering/ops/kernels.py`."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steering.ops.base import Row

Array = npt.NDArray[np.float64]


def after(row: Row, h: torch.Tensor) -> torch.Tensor:
    """`h [n, width]` with one row for every token, computed token by token in double precision."""
    numbers = {name: tensor.detach().cpu().double().numpy() for name, tensor in row.tensors.items()}
    moved = [FORMULAS[row.kernel](token, numbers) for token in h.detach().cpu().double().numpy()]
    return torch.from_numpy(np.stack(moved)).to(h)


def _add(x: Array, n: dict[str, Any]) -> Array:
    return x + n["delta"]


def _add_norm_match(x: Array, n: dict[str, Any]) -> Array:
    return x + math.sqrt(x @ x) * n["delta"]


def _add_preserve_norm(x: Array, n: dict[str, Any]) -> Array:
    moved = x + n["delta"]
    return moved * math.sqrt((x @ x) / (moved @ moved))


def _affine(x: Array, n: dict[str, Any]) -> Array:
    return x + sum((down @ x + bias) * up for up, down, bias in zip(n["up"], n["down"], n["bias"], strict=True))


def _scale_offset(x: Array, n: dict[str, Any]) -> Array:
    return x * n["scale"] + n["offset"]


def _clamp(x: Array, n: dict[str, Any]) -> Array:
    c = x @ n["direction"]
    return x + float(n["amount"]) * (min(max(c, float(n["low"])), float(n["high"])) - c) * n["direction"]


def _rotate(x: Array, n: dict[str, Any]) -> Array:
    (first, second), cos, sin = n["plane"], float(n["cos"]), float(n["sin"])
    a, b = x @ first, x @ second
    if n["adaptive"] and a <= 0:
        return x
    turned = (math.hypot(a, b) * cos, math.hypot(a, b) * sin) if n["absolute"] else (
        a * cos - b * sin, a * sin + b * cos)
    return x + (turned[0] - a) * first + (turned[1] - b) * second


def _sign_flip(x: Array, n: dict[str, Any]) -> Array:
    """Where all dims of the pattern are acted on."""
    assert n["count"] >= np.count_nonzero(n["polarity"])
    out = x.copy()
    for j in np.flatnonzero(n["polarity"]):
        agrees = (x[j] > 0) == (n["polarity"][j] > 0)
        if {0: agrees, 1: not agrees, 2: True}[int(n["mode"])]:
            out[j] = (1 - 2 * float(n["amount"])) * x[j]
    return out


FORMULAS = {"add": _add, "add_norm_match": _add_norm_match, "add_preserve_norm": _add_preserve_norm, "affine": _affine,
            "scale_offset": _scale_offset, "clamp": _clamp, "rotate": _rotate, "sign_flip": _sign_flip}
