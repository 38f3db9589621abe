"""Every op three ways: the batched kernel, the op's reference, and formulas written here in numpy from the papers.

The kernels run over a batch in which every token has numbers of its own. Routers have a file of their own.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline, RBFInterpolator

from steering.language.errors import InvalidSpec
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from steering.ops import Place, Row, get_kernel, get_operation, operations

torch.set_num_threads(1)

D, HEADS, HEAD_DIM, D_FF, T = 24, 4, 5, 40, 16
FACTS = ModelFacts("m", "f", "llama", num_layers=2, d_model=D, num_heads=HEADS, head_dim=HEAD_DIM, d_ff=D_FF,
                   vocab_size=50, context_length=64, num_experts=8, experts_per_token=3)
Array = np.ndarray
Formula = Callable[[Array, dict[str, Array], float], Array]


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def orthonormal(seed: int, rank: int, width: int = D) -> Array:
    return np.linalg.qr(rng(seed).normal(size=(width, rank)))[0].T


def tensors_of(numbers: dict[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(a, dtype=torch.int64 if np.asarray(a).dtype.kind == "i" else torch.float32)
            for name, a in numbers.items()}


def place(site: Site = "resid_post", scale: float = 1.0) -> Place:
    return Place(FACTS, site, 0, scale)


def stacked(rows: list[Row]) -> dict[str, torch.Tensor]:
    assert len({row.kernel for row in rows}) == 1
    return {name: torch.stack([row.tensors[name] for row in rows]) for name in rows[0].tensors}


def run(op: Op, h: Array, numbers: dict[str, Array], strength: float = 1.0, site: Site = "resid_post", /,
        **options: Any) -> Array:
    """The op on `h [T, width]` with the same numbers for every token, through its kernel."""
    operation = get_operation(op)
    row = operation.row(tensors_of(numbers), operation.options.model_validate(options), place(site, strength))
    return get_kernel(row.kernel)(torch.tensor(h, dtype=torch.float32), stacked([row] * len(h))).numpy()


# The formulas: numpy, float64, one token `x [width]`, the numbers of one layer, the strength.

def add_plain(x: Array, n: dict[str, Array], s: float) -> Array:
    return x + s * n.get("vector", n.get("weight"))


def add_norm_match(x: Array, n: dict[str, Array], s: float) -> Array:
    v = n["vector"]
    return x + s * math.sqrt(x @ x) / math.sqrt(v @ v) * v


def add_keeping_norm(x: Array, n: dict[str, Array], s: float) -> Array:
    moved = x + s * n["vector"]
    return moved / np.linalg.norm(moved) * np.linalg.norm(x)


def ablate_vector(x: Array, n: dict[str, Array], s: float) -> Array:
    v = n.get("vector", n.get("weight"))
    return x - s * (x @ v) / (v @ v) * v


def ablate_subspace(x: Array, n: dict[str, Array], s: float) -> Array:
    projection = n["basis"].T @ np.linalg.solve(n["basis"] @ n["basis"].T, n["basis"])
    return (np.eye(len(x)) - s * projection) @ x


def clamp_between(low: float, high: float) -> Formula:
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        v = n.get("vector", n.get("weight"))
        u = v / np.linalg.norm(v)
        c = x @ u
        return x + s * (min(max(c, low), high) - c) * u

    return formula


def rotate_to(angle: float, only_positive: bool = False) -> Formula:
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        b1, b2 = n["basis"]
        if only_positive and x @ b1 <= 0:
            return x
        inside = b1 * (x @ b1) + b2 * (x @ b2)
        theta = math.radians(angle)
        return x - inside + np.linalg.norm(inside) * (math.cos(theta) * b1 + math.sin(theta) * b2)

    return formula


def rotate_by(angle: float, only_positive: bool = False) -> Formula:
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        b1, b2 = n["basis"]
        if only_positive and x @ b1 <= 0:
            return x
        # As a matrix on the whole space: the rotation in the plane, the identity elsewhere.
        theta = math.radians(angle * s)
        generator = np.outer(b2, b1) - np.outer(b1, b2)
        plane = np.outer(b1, b1) + np.outer(b2, b2)
        return (np.eye(len(x)) + math.sin(theta) * generator + (math.cos(theta) - 1) * plane) @ x

    return formula


def low_rank(x: Array, n: dict[str, Array], s: float) -> Array:
    return x + s * sum(n["up"][k] * (n["down"][k] @ x + n["bias"][k]) for k in range(len(n["bias"])))


def each_dim(x: Array, n: dict[str, Array], s: float) -> Array:
    return np.array([xi + s * (a * xi + b - xi) for xi, a, b in zip(x, n["scale"], n["shift"], strict=True)])


def signs(mode: str, fraction: str = "1", exclude: tuple[int, ...] = ()) -> Formula:
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        pattern = [(int(j), int(p)) for j, p in zip(n["dims"], n["polarity"], strict=True) if j not in exclude]
        budget = math.ceil(Fraction(fraction) * len(pattern))
        out = x.copy()
        for j, p in sorted(pattern, key=lambda item: -abs(x[item[0]]))[:budget]:
            if mode == "flip" or (mode == "away" and np.sign(x[j]) == p) or (mode == "toward" and np.sign(x[j]) == -p):
                out[j] = x[j] + s * (-x[j] - x[j])
        return out

    return formula


def columns(name: str, target: Callable[[Array, dict[str, Array]], Any]) -> Formula:
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        out = x.copy()
        out[n[name]] = (1 - s) * x[n[name]] + s * target(x[n[name]], n)
        return out

    return formula


def heads(factor: float | None) -> Formula:
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        out = x.reshape(HEADS, HEAD_DIM).copy()
        for i, head in enumerate(n["heads"]):
            out[head] = out[head] * (1 + s * (factor - 1)) if factor is not None else out[head] + s * n["shift"][i]
        return out.reshape(-1)

    return formula


def patched(rank: int | None) -> Formula:
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        if "vector" in n:
            return x + s * (n["vector"] - x)
        q = n["basis"][:rank].T
        return x + s * q @ q.T @ (n["mean"] - x)

    return formula


def patched_at(columns: Sequence[int]) -> Formula:
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        part = np.isin(np.arange(x.shape[-1]), columns)
        return x + s * part * (n["vector"] - x)

    return formula


def spline(n: dict[str, Array]) -> Callable[[Array], Array]:
    """Points of a manifold by coordinate: scipy's natural, periodic or thin-plate spline."""
    knots, points = n["knots"], n["points"]
    if knots.shape[1] > 1:
        return RBFInterpolator(knots, points, kernel="thin_plate_spline", degree=1)
    t, p = knots[:, 0], n["period"][0]
    if p == 0:
        return lambda x: CubicSpline(t, points, bc_type="natural")(x[:, 0])
    closed = CubicSpline(np.append(t, t[0] + p), np.vstack([points, points[:1]]), bc_type="periodic")
    return lambda x: closed(x[:, 0])


def swapped(goal: Callable[[dict[str, Array], Array], Array]) -> Formula:
    """The part in the subspace replaced by `goal(numbers, part)`, the part outside left alone."""
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        part = n["basis"] @ (x - n["mean"])
        outside = x - n["basis"].T @ part
        return outside + n["basis"].T @ (part + s * (goal(n, part) - part))

    return formula


def grid_of(n: dict[str, Array]) -> Array:
    """The coordinates at which tokens are looked up, as the docs have it: 256 on a curve, 24 x 24 on a surface."""
    t, p = n["knots"], n["period"]
    if len(p) == 1:
        return (np.arange(256) * p[0] / 256 if p[0] else np.linspace(t.min(), t.max(), 256))[:, None]
    axes = [np.linspace(t[:, i].min(), t[:, i].max(), 24) for i in range(2)]
    return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], axis=1)


def found(n: dict[str, Array], part: Array) -> Array:
    grid = grid_of(n)
    return grid[np.argmin(((spline(n)(grid) - part) ** 2).sum(1))][None]


def on_way(source: Array, target: Array, share: float, period: Array) -> Array:
    change = target - source
    turns = np.where(period > 0, np.round(change / np.where(period > 0, period, 1)), 0)
    return source + share * (change - turns * period)


def knot(n: dict[str, Array], i: int) -> Array:
    return n["knots"][i:i + 1]


def along(i: int | None, j: int, share: float) -> Callable[[dict[str, Array], Array], Array]:
    """From knot i, or from where the token is, to knot j."""
    return lambda n, part: spline(n)(on_way(found(n, part) if i is None else knot(n, i), knot(n, j), share,
                                            n["period"]))[0]


def straight(i: int | None, j: int, share: float) -> Callable[[dict[str, Array], Array], Array]:
    return lambda n, part: (1 - share) * (part if i is None else n["points"][i]) + share * n["points"][j]


def carried(j: int, share: float) -> Callable[[dict[str, Array], Array], Array]:
    return lambda n, part: part + along(None, j, share)(n, part) - spline(n)(found(n, part))[0]


def moved_by(places: float, share: float) -> Callable[[dict[str, Array], Array], Array]:
    def goal(n: dict[str, Array], part: Array) -> Array:
        t, p, count = n["knots"][:, 0], n["period"][0], len(n["knots"])
        ends, numbers = (np.append(t, t[0] + p), np.arange(count + 1)) if p else (t, np.arange(count))
        where = np.interp(found(n, part)[0], ends, numbers) + share * places
        where = where % count if p else np.clip(where, 0, count - 1)
        return spline(n)(np.interp(where, numbers, ends)[None])[0]

    return goal


def features(changes: dict[int, Callable[[float], float]], norm: Callable[[Array], tuple[float, float]] | None = None,
             centred: bool = False, dropped: bool = False) -> Formula:
    """An SAE's features encoded, changed and decoded, with the error of the reconstruction added again or dropped."""
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        inward, outward = (1.0, 1.0) if norm is None else norm(x)
        mean = x.mean() if centred else 0.0
        pre = n["encoder"] @ ((x - mean) / inward) + n["encoder_bias"]
        values = np.maximum(pre, 0) * (pre > n.get("threshold", 0))
        if "k" in n:
            values[np.argsort(-pre)[int(n["k"]):]] = 0
        edited = values.copy()
        for i, change in changes.items():
            edited[i] = change(values[i])

        def decoded(f: Array) -> Array:
            return (f @ n["decoder"] + n["decoder_bias"]) * outward + mean

        error = 0 * x if dropped else x - decoded(values)
        return (1 - s) * x + s * (decoded(edited) + error)

    return formula


def without_least(share: float, weighted: bool) -> Formula:
    """Channels in the order of their sizes, times norms; the first ones of it go."""
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        score = np.abs(x) * (n["norm"] if weighted else 1)
        out = x.copy()
        out[np.argsort(score)[:math.floor(share * len(x))]] *= 1 - s
        return out

    return formula


def without_under(share: float, by_channel: bool) -> Formula:
    """A share between two of the artifact's: their levels joined by a line, beginning at 0."""
    def formula(x: Array, n: dict[str, Array], s: float) -> Array:
        levels = n["thresholds"] if by_channel else n["cut"][:, None] / n["norm"]
        at = np.concatenate([[0], n["shares"]])
        edge = np.array([np.interp(share, at, np.concatenate([[0], level])) for level in levels.T])
        return np.where(np.abs(x) > edge, x, (1 - s) * x)

    return formula


def _sparsity(width: int) -> Callable[[np.random.Generator], dict[str, Array]]:
    def make(g: np.random.Generator) -> dict[str, Array]:
        return {"norm": g.uniform(0.2, 3, size=width), "shares": np.array([0.25, 0.5, 0.75]),
                "cut": np.sort(g.uniform(0.5, 6, size=3)), "thresholds": np.sort(g.uniform(0.5, 5, size=(3, width)), 0)}

    return make


def _dictionary(count: int = 40, k: int | None = None, threshold: bool = False, norm: int | None = None
                ) -> Callable[[np.random.Generator], dict[str, Array]]:
    def make(g: np.random.Generator) -> dict[str, Array]:
        found = {"encoder": g.normal(size=(count, D)) / math.sqrt(D), "encoder_bias": g.normal(size=count) * 0.3,
                 "decoder": g.normal(size=(count, D)), "decoder_bias": g.normal(size=D)}
        if k is not None:
            found["k"] = np.asarray(k)
        if threshold:
            found["threshold"] = g.uniform(-0.2, 0.6, size=count)
        if norm is not None:
            found["input_norm"] = np.asarray(norm)
        return found

    return make


def _vector(g: np.random.Generator) -> dict[str, Array]:
    return {"vector": g.normal(size=D) * 2}


def _wide(width: int) -> Callable[[np.random.Generator], dict[str, Array]]:
    return lambda g: {"vector": g.normal(size=width) * 2}


def _probe(g: np.random.Generator) -> dict[str, Array]:
    return {"weight": g.normal(size=D) * 2, "bias": np.asarray(0.7)}


def _space(rank: int, mean: bool = False, width: int = D) -> Callable[[np.random.Generator], dict[str, Array]]:
    def make(g: np.random.Generator) -> dict[str, Array]:
        basis = {"basis": np.linalg.qr(g.normal(size=(width, rank)))[0].T}
        return {**basis, "mean": g.normal(size=width)} if mean else basis

    return make


def _pattern(g: np.random.Generator) -> dict[str, Array]:
    return {"dims": g.choice(D, 10, replace=False), "polarity": g.choice([-1, 1], 10)}


def _indices(name: str, width: int, value: bool = False) -> Callable[[np.random.Generator], dict[str, Array]]:
    def make(g: np.random.Generator) -> dict[str, Array]:
        index = {name: g.choice(width, 6, replace=False)}
        return {**index, "value": g.normal(size=6)} if value else index

    return make


def _diagonal(g: np.random.Generator) -> dict[str, Array]:
    return {"scale": g.normal(size=D), "shift": g.normal(size=D)}


def _affine(g: np.random.Generator) -> dict[str, Array]:
    return {"up": g.normal(size=(3, D)), "down": g.normal(size=(3, D)), "bias": g.normal(size=3)}


def _heads(shift: bool) -> Callable[[np.random.Generator], dict[str, Array]]:
    def make(g: np.random.Generator) -> dict[str, Array]:
        index = {"heads": g.choice(HEADS, 2, replace=False)}
        return {**index, "shift": g.normal(size=(2, HEAD_DIM))} if shift else index

    return make


def _manifold(wraps: bool) -> Callable[[np.random.Generator], dict[str, Array]]:
    """A bent ring or thread of six labels in four dimensions, with uneven knots that begin at 0."""
    def make(g: np.random.Generator) -> dict[str, Array]:
        knots = np.append(0, np.cumsum(g.uniform(0.7, 1.3, size=5)))
        angle = knots * (2 * math.pi / 7 if wraps else 0.4)
        points = np.stack([np.cos(angle), np.sin(angle), 0.3 * np.cos(2 * angle), 0.1 * angle], axis=1) * 4
        return {"basis": np.linalg.qr(g.normal(size=(D, 4)))[0].T, "mean": g.normal(size=D),
                "knots": knots.astype(np.float32).astype(float)[:, None], "points": points,
                "period": np.array([7.0 if wraps else 0.0])}

    return make


def _sheet(g: np.random.Generator) -> dict[str, Array]:
    knots = np.array([[x, y] for x in range(2) for y in range(3)], dtype=float)
    return {"basis": np.linalg.qr(g.normal(size=(D, 3)))[0].T, "mean": g.normal(size=D), "knots": knots,
            "points": np.column_stack([knots * 3, g.normal(size=6)]), "period": np.zeros(2)}


DAYS = {"labels": ["a", "b", "c", "d", "e", "f"]}
Case = tuple[Op, dict[str, Any], Callable[[np.random.Generator], dict[str, Array]], Formula, Site]
CASES: list[Case] = [
    ("add", {}, _vector, add_plain, "resid_post"),
    ("add", {}, _probe, add_plain, "resid_pre"),
    ("add", {"norm_match": True}, _vector, add_norm_match, "resid_post"),
    ("add", {"preserve_norm": True}, _vector, add_keeping_norm, "attn_out"),
    ("ablate", {}, _vector, ablate_vector, "resid_post"),
    ("ablate", {}, _probe, ablate_vector, "resid_post"),
    ("ablate", {}, _space(1), ablate_subspace, "mlp_out"),
    ("ablate", {}, _space(5), ablate_subspace, "resid_post"),
    ("clamp", {"value": 0.5}, _vector, clamp_between(0.5, 0.5), "resid_post"),
    ("clamp", {"value": -2}, _probe, clamp_between(-2, -2), "resid_post"),
    ("clamp", {"value": 0}, _vector, clamp_between(0, 0), "resid_post"),
    ("clamp", {"min": 0.2}, _vector, clamp_between(0.2, math.inf), "resid_post"),
    ("clamp", {"max": -0.1}, _vector, clamp_between(-math.inf, -0.1), "resid_post"),
    ("clamp", {"min": -0.3, "max": 0.6}, _vector, clamp_between(-0.3, 0.6), "resid_post"),
    ("rotate", {"angle": 75}, _space(2), rotate_to(75), "resid_post"),
    ("rotate", {"angle": 190, "adaptive": True}, _space(2), rotate_to(190, True), "resid_post"),
    ("rotate", {"angle": 75, "mode": "by"}, _space(2), rotate_by(75), "resid_post"),
    ("rotate", {"angle": -400, "mode": "by", "adaptive": True}, _space(2), rotate_by(-400, True), "resid_post"),
    ("sae", {"features": {"3": {"set": 2.5}, "17": {"add": -1.0}, "8": {"scale": 0.0}, "9": {"min": 0.7}}},
     _dictionary(), features({3: lambda f: 2.5, 17: lambda f: f - 1, 8: lambda f: 0.0, 9: lambda f: max(f, 0.7)}),
     "resid_post"),
    ("sae", {"features": {"5": {"scale": 3.0}}}, _dictionary(threshold=True), features({5: lambda f: 3 * f}),
     "resid_pre"),
    ("sae", {"features": {"5": {"set": 0.0}, "30": {"add": 4.0}, "31": {"scale": -1.0}}}, _dictionary(k=6),
     features({5: lambda f: 0.0, 30: lambda f: f + 4, 31: lambda f: -f}), "mlp_out"),
    ("sae", {"features": {"2": {"set": 3.0}, "4": {"scale": 0.5}}}, _dictionary(threshold=True, norm=1),
     features({2: lambda f: 3.0, 4: lambda f: 0.5 * f}, lambda x: (np.linalg.norm(x) / math.sqrt(D),) * 2),
     "resid_post"),
    ("sae", {"features": {"2": {"set": 3.0}, "4": {"scale": 0.5}}}, _dictionary(k=7, norm=2),
     features({2: lambda f: 3.0, 4: lambda f: 0.5 * f}, lambda x: (x.std(ddof=1) + 1e-5, x.std(ddof=1)), centred=True),
     "resid_post"),
    ("sae", {"error": "drop"}, _dictionary(), features({}, dropped=True), "resid_post"),
    ("sae", {"error": "drop", "features": {"3": {"set": 2.5}, "9": {"min": 0.7}}}, _dictionary(threshold=True),
     features({3: lambda f: 2.5, 9: lambda f: max(f, 0.7)}, dropped=True), "attn_out"),
    ("sae", {"error": "drop", "features": {"30": {"add": 4.0}}}, _dictionary(k=6),
     features({30: lambda f: f + 4}, dropped=True), "mlp_out"),
    ("sae", {"error": "drop", "features": {"2": {"set": 3.0}}}, _dictionary(k=7, norm=2),
     features({2: lambda f: 3.0}, lambda x: (x.std(ddof=1) + 1e-5, x.std(ddof=1)), centred=True, dropped=True),
     "resid_post"),
    ("affine", {}, _affine, low_rank, "resid_post"),
    ("affine", {}, _diagonal, each_dim, "mlp_out"),
    *[("sign_flip", {"mode": mode}, _pattern, signs(mode), "resid_post") for mode in ("away", "toward", "flip")],
    *[("sign_flip", {"mode": mode, "fraction": 0.3}, _pattern, signs(mode, "3/10"), "resid_post")
      for mode in ("away", "toward", "flip")],
    ("sign_flip", {"fraction": 0.01}, _pattern, signs("away", "1/100"), "resid_post"),
    ("sign_flip", {"mode": "flip", "fraction": 0.5, "exclude": [0, 3, 5, 9, 20]}, _pattern,
     signs("flip", "1/2", (0, 3, 5, 9, 20)), "resid_post"),
    ("mask", {}, _indices("dims", D), columns("dims", lambda x, n: 0 * x), "resid_post"),
    ("mask", {"mode": "set"}, _indices("dims", D, True), columns("dims", lambda x, n: n["value"]), "resid_post"),
    ("mask", {"mode": "scale", "scale": -1.5}, _indices("dims", D), columns("dims", lambda x, n: -1.5 * x), "mlp_out"),
    ("neuron_mask", {}, _indices("neurons", D_FF), columns("neurons", lambda x, n: 0 * x), "mlp_act"),
    ("neuron_mask", {"mode": "set"}, _indices("neurons", D_FF, True), columns("neurons", lambda x, n: n["value"]),
     "mlp_act"),
    ("neuron_mask", {"mode": "scale", "scale": 3}, _indices("neurons", D_FF), columns("neurons", lambda x, n: 3 * x),
     "mlp_act"),
    ("head_mask", {}, _heads(False), heads(0.0), "head_out"),
    ("head_mask", {"scale": 0.25}, _heads(True), heads(0.25), "head_out"),
    ("head_mask", {"mode": "shift"}, _heads(True), heads(None), "head_out"),
    ("manifold", {**DAYS, "target": "e"}, _manifold(True), swapped(straight(None, 4, 1)), "resid_post"),
    ("manifold", {**DAYS, "target": "e", "source": "a", "fraction": 0.3}, _manifold(True), swapped(along(0, 4, 0.3)),
     "resid_pre"),
    ("manifold", {"target": 4, "source": 0, "fraction": 0.3}, _manifold(False), swapped(along(0, 4, 0.3)), "mlp_out"),
    ("manifold", {**DAYS, "target": "e", "fraction": 0.6}, _manifold(True), swapped(along(None, 4, 0.6)), "resid_post"),
    ("manifold", {**DAYS, "target": "e", "fraction": 0.6}, _manifold(False), swapped(along(None, 4, 0.6)),
     "resid_post"),
    ("manifold", {**DAYS, "target": "e", "keep_offset": True}, _manifold(True), swapped(carried(4, 1)), "resid_post"),
    ("manifold", {**DAYS, "target": "c", "source": "a", "fraction": 0.4, "path": "chord"}, _manifold(True),
     swapped(straight(0, 2, 0.4)), "resid_post"),
    ("manifold", {**DAYS, "target": "c", "fraction": 0.4, "path": "chord"}, _manifold(True),
     swapped(straight(None, 2, 0.4)), "resid_post"),
    ("manifold", {"shift": 2.5}, _manifold(True), swapped(moved_by(2.5, 1)), "resid_post"),
    ("manifold", {"shift": -2, "fraction": 0.5}, _manifold(False), swapped(moved_by(-2, 0.5)), "resid_post"),
    ("manifold", {**DAYS, "target": "f", "source": [0, 0.5], "fraction": 0.5}, _sheet,
     swapped(lambda n, part: spline(n)(np.array([[0.5, 1.25]]))[0]), "resid_post"),
    ("manifold", {"target": [1, 2], "fraction": 0.5}, _sheet, swapped(along(None, 5, 0.5)), "resid_post"),
    ("manifold", {"shift": [0.5, -1]}, _sheet,
     swapped(lambda n, part: spline(n)(np.clip(found(n, part) + [0.5, -1], 0, [1, 2]))[0]), "resid_post"),
    ("patch", {}, _vector, patched(None), "resid_post"),
    ("patch", {}, _space(4, mean=True), patched(None), "resid_post"),
    ("patch", {"basis_rank": 2}, _space(4, mean=True), patched(2), "resid_post"),
    ("patch", {}, _space(3, mean=True, width=D_FF), patched(None), "mlp_act"),
    ("patch", {"neurons": [3, 8]}, _wide(D_FF), patched_at([3, 8]), "mlp_act"),
    ("patch", {"heads": [1]}, _wide(HEADS * HEAD_DIM), patched_at(range(HEAD_DIM, 2 * HEAD_DIM)), "head_out"),
    *[("sparsify", {"method": method, "share": share}, _sparsity(width), without_least(share, method == "wina"), site)
      for method, share, width, site in (("magnitude", 0.5, D_FF, "mlp_act"), ("wina", 0.5, D_FF, "mlp_act"),
                                         ("wina", 0.3, HEADS * HEAD_DIM, "head_out"))],
    *[("sparsify", {"method": method, "share": share}, _sparsity(width), without_under(share, method == "threshold"),
       site) for method, share, width, site in (
        ("threshold", 0.5, D_FF, "mlp_act"), ("threshold", 0.4, HEADS * HEAD_DIM, "head_out"),
        ("chess", 0.75, D_FF, "mlp_act"), ("chess", 0.1, D_FF, "mlp_act"))],
]
NAMES = [f"{op}-{'-'.join(f'{k}={v}' for k, v in options.items() if k != 'labels')}-"
         f"{make.__qualname__.split('.')[0]}-{site}"
         for op, options, make, _, site in CASES]


def _scales(op: Op, options: dict[str, Any]) -> list[float]:
    # Turning to an angle knows no half.
    all_or_nothing = op == "rotate" and options.get("mode", "to") == "to"
    return [1.0] * T if all_or_nothing else [(1.0, 0.5, -1.0, 1.7)[t % 4] for t in range(T)]


@pytest.mark.parametrize(("op", "options", "make", "formula", "site"), CASES, ids=NAMES)
def test_kernel_and_reference_and_formula_agree(op: Op, options: dict[str, Any], make: Any, formula: Formula,
                                                site: Site) -> None:
    operation, parsed = get_operation(op), get_operation(op).options.model_validate(options)
    assert site in operation.sites
    h = rng(1).normal(size=(T, FACTS.width(site))) * 3
    numbers = [make(rng(100 + t)) for t in range(T)]
    scales = _scales(op, options)
    rows = [operation.row(tensors_of(n), parsed, place(site, s)) for n, s in zip(numbers, scales, strict=True)]
    x = torch.tensor(h, dtype=torch.float32)
    before = x.clone()
    batched = get_kernel(rows[0].kernel)(x, stacked(rows)).numpy()
    assert torch.equal(x, before), "the kernel wrote into the model's activation"
    plain = np.stack([operation.reference(x[t:t + 1], tensors_of(numbers[t]), parsed, place(site, scales[t]))[0].numpy()
                      for t in range(T)])
    wanted = np.stack([formula(h[t], numbers[t], scales[t]) for t in range(T)])
    np.testing.assert_allclose(plain, wanted, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(batched, wanted, rtol=1e-5, atol=2e-5)
    assert np.abs(wanted - h).max() > 1e-2, "the case acts on nothing"


@pytest.mark.parametrize(("op", "options", "make", "formula", "site"), CASES, ids=NAMES)
def test_tokens_do_not_mix(op: Op, options: dict[str, Any], make: Any, formula: Formula, site: Site) -> None:
    """One token's activation and numbers may not reach another token, whatever they are."""
    operation, parsed = get_operation(op), get_operation(op).options.model_validate(options)
    h = torch.tensor(rng(2).normal(size=(T, FACTS.width(site))), dtype=torch.float32)
    rows = [operation.row(tensors_of(make(rng(t))), parsed, place(site)) for t in range(T)]
    kernel = get_kernel(rows[0].kernel)
    together = kernel(h, stacked(rows))
    h[3] = torch.nan
    rows[3] = Row(rows[3].kernel, {name: torch.full_like(t, torch.nan) for name, t in rows[3].tensors.items()})
    poisoned = kernel(h, stacked(rows))
    others = [t for t in range(T) if t != 3]
    torch.testing.assert_close(poisoned[others], together[others], rtol=1e-6, atol=1e-6)


def test_every_op_of_the_language_has_a_case() -> None:
    assert {case[0] for case in CASES} == {operation.name for operation in operations()} - {"expert_mask"}


# Algebra.

H = rng(7).normal(size=(T, D)) * 2
V = rng(8).normal(size=D)


def close(a: Array, b: Array, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


def norms(x: Array) -> Array:
    return np.linalg.norm(x, axis=-1)


def test_ablation_is_idempotent_and_leaves_nothing_along_the_direction() -> None:
    for numbers in ({"vector": V}, {"basis": orthonormal(3, 6)}):
        once = run("ablate", H, numbers)
        close(run("ablate", once, numbers), once)
        basis = numbers.get("basis", V[None] / np.linalg.norm(V))
        assert np.abs(once @ basis.T).max() < 1e-5


def test_ablating_a_subspace_is_ablating_its_axes_one_by_one() -> None:
    basis = orthonormal(4, 5)
    stepwise = H
    for axis in basis[::-1]:
        stepwise = run("ablate", stepwise, {"vector": 3 * axis})
    close(run("ablate", H, {"basis": basis}), stepwise)


def test_a_subspace_is_the_same_in_any_basis() -> None:
    basis, turn = orthonormal(5, 4), np.linalg.qr(rng(6).normal(size=(4, 4)))[0]
    close(run("ablate", H, {"basis": basis}), run("ablate", H, {"basis": turn @ basis}))
    close(run("patch", H, {"basis": basis, "mean": V}), run("patch", H, {"basis": turn @ basis, "mean": V}))


def test_half_an_addition_twice_is_the_whole() -> None:
    close(run("add", run("add", H, {"vector": V}, 0.6), {"vector": V}, 0.6), run("add", H, {"vector": V}, 1.2))


@pytest.mark.parametrize("scale", [0.1, 1.0, -3.0, 1e4])
def test_preserve_norm_preserves_it(scale: float) -> None:
    moved = run("add", H, {"vector": V}, scale, preserve_norm=True)
    np.testing.assert_allclose(norms(moved), norms(H), rtol=1e-5)
    cosine = moved @ V / norms(moved) / np.linalg.norm(V)
    assert np.all((cosine - H @ V / norms(H) / np.linalg.norm(V)) * scale > 0)


def test_preserve_norm_of_a_token_that_is_cancelled() -> None:
    h = np.stack([-V, V])
    assert np.isfinite(run("add", h, {"vector": V}, preserve_norm=True)).all()


def test_norm_match_does_not_see_the_length_of_the_vector() -> None:
    close(run("add", H, {"vector": V}, 0.5, norm_match=True), run("add", H, {"vector": 50 * V}, 0.5, norm_match=True))
    moved = run("add", H, {"vector": V}, 0.5, norm_match=True)
    np.testing.assert_allclose(norms(moved - H), 0.5 * norms(H), rtol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_directions_of_extreme_length(size: float) -> None:
    """Squares of these numbers leave float32."""
    close(run("ablate", H, {"vector": V * size}), run("ablate", H, {"vector": V}))
    close(run("clamp", H, {"vector": V * size}, value=1), run("clamp", H, {"vector": V}, value=1))
    close(run("add", H, {"vector": V * size}, 2, norm_match=True), run("add", H, {"vector": V}, 2, norm_match=True))


@pytest.mark.parametrize("options", [{"angle": 33}, {"angle": -120}, {"angle": 33, "mode": "by"},
                                     {"angle": 270, "adaptive": True}])
def test_rotation_preserves_norms_and_everything_outside_of_the_plane(options: dict[str, Any]) -> None:
    plane = orthonormal(9, 2)
    moved = run("rotate", H, {"basis": plane}, **options)
    np.testing.assert_allclose(norms(moved), norms(H), rtol=1e-5)
    np.testing.assert_allclose(norms(moved @ plane.T), norms(H @ plane.T), rtol=1e-4)
    outside = np.eye(D) - plane.T @ plane
    close(moved @ outside, H @ outside)


@pytest.mark.parametrize(("angle", "first", "second"), [(0, 1, 0), (90, 0, 1), (180, -1, 0), (270, 0, -1), (-90, 0, -1),
                                                        (450, 0, 1), (45, math.sqrt(0.5), math.sqrt(0.5))])
def test_angle_convention(angle: float, first: float, second: float) -> None:
    """0 degrees is along the first axis, 90 along the second, 180 opposite to the first."""
    plane = orthonormal(9, 2)
    inside = run("rotate", H, {"basis": plane}, angle=angle) @ plane.T
    close(inside, norms(H @ plane.T)[:, None] * np.array([[first, second]]))


def test_turning_to_the_angle_that_is_there_does_nothing() -> None:
    plane = orthonormal(9, 2)
    for token in H:
        angle = math.degrees(math.atan2(token @ plane[1], token @ plane[0]))
        close(run("rotate", token[None], {"basis": plane}, angle=angle), token[None])


def test_turning_by_an_angle_and_back() -> None:
    plane = orthonormal(9, 2)
    there = run("rotate", H, {"basis": plane}, 0.5, angle=140, mode="by")
    close(there, run("rotate", H, {"basis": plane}, angle=70, mode="by"))
    close(run("rotate", there, {"basis": plane}, -1, angle=70, mode="by"), H)


def test_adaptive_turns_only_what_points_along_the_first_axis() -> None:
    plane = orthonormal(9, 2)
    moved = run("rotate", H, {"basis": plane}, angle=160, adaptive=True)
    ahead = H @ plane[0] > 0
    assert 0 < ahead.sum() < T
    changed = np.any(moved != H.astype(np.float32), axis=1)
    np.testing.assert_array_equal(changed, ahead)


def test_token_outside_of_the_plane_is_left_alone() -> None:
    plane = np.eye(D)[:2]
    token = np.zeros((1, D))
    token[0, 5] = 3
    for options in ({"angle": 90}, {"angle": 90, "mode": "by"}):
        np.testing.assert_array_equal(run("rotate", token, {"basis": plane}, **options), token)


@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 3), st.floats(0, 3))
def test_clamped_coordinate_lies_within_the_bounds(low: float, span: float) -> None:
    u = V / np.linalg.norm(V)
    moved = run("clamp", H, {"vector": V}, min=low, max=low + span)
    before, after = H @ u, moved @ u
    assert np.all((after > low - 1e-4) & (after < low + span + 1e-4))
    inside = (before > low + 1e-4) & (before < low + span - 1e-4)
    np.testing.assert_array_equal(moved[inside], H[inside].astype(np.float32))
    close(moved - np.outer(after, u), H - np.outer(before, u), 1e-4)


def test_clamp_to_zero_is_ablation() -> None:
    close(run("clamp", H, {"vector": V}, value=0), run("ablate", H, {"vector": V}))


def test_patch_with_the_activation_itself_is_exact() -> None:
    token = H[:1].astype(np.float32)
    np.testing.assert_array_equal(run("patch", token, {"vector": token[0]}), token)
    close(run("patch", token, {"basis": orthonormal(3, 4), "mean": token[0]}), token)
    np.testing.assert_array_equal(run("patch", H, {"vector": V}), np.tile(V.astype(np.float32), (T, 1)))


def test_patch_in_the_whole_space_is_the_whole_patch() -> None:
    close(run("patch", H, {"basis": orthonormal(2, D), "mean": V}), run("patch", H, {"vector": V}))


def test_patch_keeps_what_is_outside_of_the_subspace() -> None:
    basis = orthonormal(3, 4)
    moved = run("patch", H, {"basis": basis, "mean": V})
    close(moved @ basis.T, np.tile(basis @ V, (T, 1)))
    outside = np.eye(D) - basis.T @ basis
    close(moved @ outside, H @ outside)


def test_patch_is_blind_to_the_length_of_a_direction() -> None:
    """Makelov et al. 2023: v and 5v patch the same; w + ((u.v - w.v) / |v|^2) v."""
    source = rng(30).normal(size=D)
    for length in (1, 5):
        v = length * V
        wanted = H + np.outer((source @ v - H @ v) / (v @ v), v)
        close(run("patch", H, {"basis": (v / np.linalg.norm(v))[None], "mean": source}), wanted)


FLIP = {"dims": np.array([0, 1, 2, 3]), "polarity": np.array([1, 1, -1, -1])}


@pytest.mark.parametrize(("mode", "wanted"), [("away", [-5, -6, 7, 8]), ("toward", [5, 6, -7, -8]),
                                              ("flip", [-5, 6, 7, -8])])
def test_sign_flip_truth_table(mode: str, wanted: list[float]) -> None:
    """Dims: agrees with +, disagrees with +, agrees with -, disagrees with -."""
    h = np.array([[5.0, -6, -7, 8, 9]])
    h = np.concatenate([h, np.ones((1, D - 5))], axis=1)
    moved = run("sign_flip", h, FLIP, mode=mode)
    assert moved[0, :4].tolist() == wanted
    np.testing.assert_array_equal(moved[:, 4:], h[:, 4:])


def test_sign_flip_laws() -> None:
    pattern = _pattern(rng(40))
    x = H.astype(np.float32)
    away, toward = run("sign_flip", x, pattern), run("sign_flip", x, pattern, mode="toward")
    # Once everything disagrees (or agrees), there is nothing left to do.
    np.testing.assert_array_equal(run("sign_flip", away, pattern), away)
    np.testing.assert_array_equal(run("sign_flip", toward, pattern, mode="toward"), toward)
    # Away of one polarity is toward of the other.
    opposite = {**pattern, "polarity": -pattern["polarity"]}
    np.testing.assert_array_equal(run("sign_flip", x, opposite, mode="toward"), away)
    # Flip undoes itself, and is away and toward at once.
    flipped = run("sign_flip", x, pattern, mode="flip")
    np.testing.assert_array_equal(run("sign_flip", flipped, pattern, mode="flip"), x)
    np.testing.assert_array_equal(np.where(away != x, away, toward), flipped)
    # Magnitudes stay, and so does the norm.
    np.testing.assert_array_equal(np.abs(away), np.abs(x))
    # Away takes the agreement to 0, toward to 1.
    dims, polarity = pattern["dims"], pattern["polarity"]
    assert not (np.sign(away[:, dims]) == polarity).any()
    assert (np.sign(toward[:, dims]) == polarity).all()


def test_zero_has_no_sign() -> None:
    h = np.zeros((1, D))
    for mode in ("away", "toward", "flip"):
        np.testing.assert_array_equal(run("sign_flip", h, FLIP, mode=mode), h)


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.07, 2), (0.1, 2), (0.15, 3), (0.3, 6), (0.35, 7),
                                                 (0.55, 11), (1.0, 20)])
def test_fraction_takes_the_largest_magnitudes(fraction: float, count: int) -> None:
    """Of 20 dims: rounded up, and never by a rounding error of the product."""
    dims = np.arange(20)
    pattern = {"dims": dims, "polarity": np.ones(20, int)}
    moved = run("sign_flip", H, pattern, mode="flip", fraction=fraction)
    for before, after in zip(H.astype(np.float32), moved, strict=True):
        flipped = set(np.flatnonzero(before != after).tolist())
        assert flipped == set(np.argsort(-np.abs(before[:20]))[:count].tolist())


def test_fraction_counts_dims_whether_they_agree_or_not() -> None:
    h = np.zeros((1, D))
    h[0, :4] = [9, -8, 1, 1]
    pattern = {"dims": np.arange(4), "polarity": np.ones(4, int)}
    moved = run("sign_flip", h, pattern, mode="away", fraction=0.5)
    assert moved[0, :4].tolist() == [-9, -8, 1, 1]


def test_equal_magnitudes_are_taken_in_order_of_the_dims() -> None:
    pattern = {"dims": np.array([9, 4, 7, 2]), "polarity": np.ones(4, int)}
    moved = run("sign_flip", np.ones((1, D)), pattern, fraction=0.5)
    assert np.flatnonzero(moved[0] < 0).tolist() == [2, 4]


def test_excluded_dims_are_never_touched() -> None:
    moved = run("sign_flip", H, FLIP, mode="flip", exclude=[1, 2])
    assert (moved[:, [0, 3]] == -H[:, [0, 3]].astype(np.float32)).all()
    np.testing.assert_array_equal(moved[:, 1:3], H[:, 1:3].astype(np.float32))
    with pytest.raises(InvalidSpec) as caught:
        run("sign_flip", H, FLIP, exclude=[0, 1, 2, 3])
    assert caught.value.param == "options.exclude"


def test_half_a_flip_is_zero() -> None:
    assert not run("sign_flip", H, FLIP, 0.5, mode="flip")[:, :4].any()


# Learned methods as affine maps.

def test_loreft_as_affine() -> None:
    """h + R^T (W h + b - R h)."""
    g = rng(50)
    r, w, b = orthonormal(51, 4), g.normal(size=(4, D)), g.normal(size=4)
    wanted = np.stack([h + r.T @ (w @ h + b - r @ h) for h in H])
    close(run("affine", H, {"up": r, "down": w - r, "bias": b}), wanted)


def test_direft_as_affine() -> None:
    """h + W2^T (W1 h + b)."""
    g = rng(52)
    w1, w2, b = g.normal(size=(2, D)), g.normal(size=(2, D)), g.normal(size=2)
    close(run("affine", H, {"up": w2, "down": w1, "bias": b}), np.stack([h + w2.T @ (w1 @ h + b) for h in H]))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5])
def test_ace_as_affine(alpha: float) -> None:
    """h - proj_r(h) + proj_r(mu-) + alpha r; alpha 0 and 1 stand at the class means."""
    g = rng(53)
    negative, positive = g.normal(size=D), g.normal(size=D)
    r = positive - negative
    u = r / np.linalg.norm(r)
    wanted = np.stack([h - (h @ u) * u + (negative @ u) * u + alpha * r for h in H])
    bias = np.array([negative @ u + alpha * np.linalg.norm(r)])
    moved = run("affine", H, {"up": u[None], "down": -u[None], "bias": bias})
    close(moved, wanted)
    close(moved @ u, np.full(T, (negative + alpha * r) @ u))


def test_add_and_ablate_as_affine() -> None:
    one = np.zeros((1, D))
    close(run("affine", H, {"up": V[None], "down": one, "bias": np.ones(1)}), run("add", H, {"vector": V}))
    basis = orthonormal(54, 3)
    close(run("affine", H, {"up": -basis, "down": basis, "bias": np.zeros(3)}), run("ablate", H, {"basis": basis}))


@pytest.mark.parametrize(("op", "options", "make", "formula", "site"), CASES, ids=NAMES)
def test_strength_0_gives_the_activation_back(op: Op, options: dict[str, Any], make: Any, formula: Formula,
                                              site: Site) -> None:
    """Bit for bit even where a row with strength 0 is run, which the compiler does not make."""
    h = rng(3).normal(size=(T, FACTS.width(site))).astype(np.float32)
    if op == "rotate" and options.get("mode", "to") == "to":
        with pytest.raises(InvalidSpec):
            run(op, h, make(rng(0)), 0.0, site, **options)
    elif options.get("preserve_norm"):
        # The norm is computed anew here.
        close(run(op, h, make(rng(60)), 0.0, site, **options), h)
    else:
        np.testing.assert_array_equal(run(op, h, make(rng(60)), 0.0, site, **options), h)


@pytest.mark.parametrize(("op", "numbers", "options", "site", "param"), [
    ("mask", {"dims": np.array([D])}, {}, "resid_post", "inline.dims"),
    ("mask", {"dims": np.array([1])}, {"mode": "set"}, "resid_post", "options.mode"),
    ("neuron_mask", {"neurons": np.array([D_FF])}, {}, "mlp_act", "inline.neurons"),
    ("head_mask", {"heads": np.array([HEADS])}, {}, "head_out", "inline.heads"),
    ("head_mask", {"heads": np.array([1])}, {"mode": "shift"}, "head_out", "options.mode"),
    ("head_mask", {"heads": np.array([1]), "shift": np.ones((1, 3))}, {"mode": "shift"}, "head_out", "inline.shift"),
    ("sign_flip", {"dims": np.array([D]), "polarity": np.array([1])}, {}, "resid_post", "inline.dims"),
    ("rotate", {"basis": np.eye(D)[:3]}, {"angle": 1}, "resid_post", "inline.basis"),
    ("rotate", {"basis": np.eye(D)[:1]}, {"angle": 1}, "resid_post", "inline.basis"),
    ("patch", {"basis": np.eye(D)[:2]}, {}, "resid_post", "inline.mean"),
    ("patch", {"basis": np.eye(D)[:2], "mean": V}, {"basis_rank": 3}, "resid_post", "options.basis_rank"),
    ("patch", {"vector": V}, {"basis_rank": 1}, "resid_post", "options.basis_rank"),
    ("patch", {"vector": V}, {"heads": [0]}, "resid_post", "options.heads"),
    ("patch", {"vector": np.ones(D_FF)}, {"neurons": [D_FF]}, "mlp_act", "options.neurons"),
    ("patch", {"basis": np.eye(D)[:2], "mean": V}, {"neurons": [0]}, "resid_post", "options.neurons"),
])
def test_numbers_that_do_not_fit(op: Op, numbers: dict[str, Array], options: dict[str, Any], site: Site, param: str
                                 ) -> None:
    with pytest.raises(InvalidSpec) as caught:
        run(op, np.zeros((1, FACTS.width(site))), numbers, 1.0, site, **options)
    assert caught.value.param == param


# Sparsification.

SPARSE = _sparsity(D_FF)(rng(31))
X = rng(32).normal(size=(T, D_FF)) * 3


@pytest.mark.parametrize("method", ["magnitude", "wina", "threshold", "chess", "random"])
def test_a_share_of_0_leaves_every_bit(method: str) -> None:
    x = X.copy()
    x[0, :4] = [0.0, -0.0, 1e-38, -1e-38]
    h = torch.tensor(x, dtype=torch.float32)
    out = torch.tensor(run("sparsify", x, SPARSE, 1.0, "mlp_act", method=method, share=0.0))
    assert torch.equal(out.view(torch.int32), h.view(torch.int32))


def test_random_channels_are_as_many_and_the_same_for_every_token_and_differ_by_layer_and_seed() -> None:
    ones = np.ones((T, D_FF))
    out = run("sparsify", ones, {}, 1.0, "mlp_act", method="random", share=0.5)
    assert (out.sum(axis=1) == D_FF - D_FF // 2).all() and (out == out[:1]).all()
    assert (out != run("sparsify", ones, {}, 1.0, "mlp_act", method="random", share=0.5, seed=1)).any()
    operation = get_operation("sparsify")
    options = operation.options.model_validate({"method": "random", "share": 0.5})
    rows = [operation.row({}, options, Place(FACTS, "mlp_act", layer, 1.0)).tensors["cut"] for layer in (0, 1)]
    assert not torch.equal(*rows)


@pytest.mark.parametrize(("options", "numbers", "param"), [
    ({"method": "wina", "share": 0.5}, {}, "options.method"),
    ({"method": "chess", "share": 0.5}, {"norm": SPARSE["norm"]}, "options.method"),
    ({"method": "threshold", "share": 0.8}, SPARSE, "options.share")])
def test_numbers_that_a_method_lacks_are_named(options: dict[str, Any], numbers: dict[str, Array], param: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        run("sparsify", X, numbers, 1.0, "mlp_act", **options)
    assert caught.value.param == param
