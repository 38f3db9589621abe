"""Every form of every op, as one intervention of a spec and as a plain formula.

The numbers are taken from activations of the model itself, so that each change is of the size of what it changes and
shows in the log-probabilities of any model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.verify import formulas as f
from server.verify.hooks import Function
from steering.models.facts import ModelFacts

# Degrees by which a wrong angle is off.
WRONG_ANGLE = -70.0


@dataclass(frozen=True)
class Local:
    """What an op may need to know of the place where it is to act.

    seen: activations `[T, width]` of one text, the first token left out. number: differs from case to case.
    """

    facts: ModelFacts
    site: str
    layer: int
    seen: Tensor
    number: int

    @property
    def size(self) -> float:
        return float(self.seen.norm(dim=-1).median())

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.number))

    def vector(self, share: float = 0.6) -> Tensor:
        """A random direction with a share of the activations' size for length."""
        v = self.noise(self.seen.shape[-1])
        return v / v.norm() * self.size * share

    def basis(self, rank: int) -> Tensor:
        """Orthonormal rows: the mean activation, the first token, the second, and so on."""
        rows = torch.cat([self.seen.mean(0, keepdim=True), self.seen[:rank - 1]]).double()
        return torch.linalg.qr(rows.T).Q.T.float().contiguous()

    def largest(self, share: float) -> list[int]:
        """The columns that are largest on the average, as a share of all."""
        order = self.seen.abs().mean(0).argsort(descending=True)
        return sorted(order[:max(2, round(share * len(order)))].tolist())


@dataclass(frozen=True)
class Change:
    """One intervention without site, layers and scope, and `formula(strength)` for the same."""

    spec: Mapping[str, Any]
    formula: Callable[[float], Function]
    strength: float = 1.0


Form = Callable[[Local], Change]


def _add(place: Local) -> Change:
    v = place.vector()
    return Change({"inline": {"vector": v.tolist()}}, lambda c: f.add(v, c), 1.25)


def _add_norm_match(place: Local) -> Change:
    v = place.vector()
    return Change({"inline": {"vector": v.tolist()}, "options": {"norm_match": True}},
                  lambda c: f.add_norm_match(v, c), 0.7)


def _add_preserve_norm(place: Local) -> Change:
    v = place.vector()
    return Change({"inline": {"vector": v.tolist()}, "options": {"preserve_norm": True}},
                  lambda c: f.add_preserve_norm(v, c), 1.5)


def _ablate_direction(place: Local) -> Change:
    v = place.seen.mean(0)
    return Change({"inline": {"vector": v.tolist()}}, lambda c: f.ablate((v / v.norm())[None], c))


def _ablate_subspace(place: Local) -> Change:
    basis = place.basis(3)
    return Change({"inline": {"basis": basis.tolist()}}, lambda c: f.ablate(basis, c), 0.9)


def _clamp_value(place: Local) -> Change:
    v, value = place.seen.mean(0), -0.5 * place.size
    return Change({"inline": {"vector": v.tolist(), "value": value}}, lambda c: f.clamp(v, value, value, c))


def _clamp_range(place: Local) -> Change:
    v = place.seen.mean(0)
    # Round the coordinates that tokens have, and a little beside their middle, so that hardly one stays as it is.
    middle = float((place.seen @ (v / v.norm())).median())
    low, high = middle + 0.25 * place.size, middle + 0.3 * place.size
    return Change({"inline": {"vector": v.tolist(), "min": low, "max": high}}, lambda c: f.clamp(v, low, high, c))


def _rotate_to(place: Local) -> Change:
    plane = place.basis(2)
    return Change({"inline": {"basis": plane.tolist(), "angle": 140.0}},
                  lambda c: f.rotate(plane, 140.0 if c == 1.0 else WRONG_ANGLE, by=False))


def _rotate_by(place: Local) -> Change:
    plane = place.basis(2)
    return Change({"inline": {"basis": plane.tolist(), "angle": 120.0, "mode": "by"}},
                  lambda c: f.rotate(plane, 120.0 * c, by=True), 0.9)


def _affine(place: Local) -> Change:
    up, down = place.basis(2), place.noise(2, place.seen.shape[-1]) / place.seen.shape[-1] ** 0.5
    bias = torch.tensor([-0.7, 0.4]) * place.size
    return Change({"inline": {"up": up.tolist(), "down": down.tolist(), "bias": bias.tolist()}},
                  lambda c: f.affine(up, down, bias, c))


def _diagonal(place: Local) -> Change:
    scale, shift = 1 + 0.3 * place.noise(place.seen.shape[-1]), place.vector(0.4)
    return Change({"inline": {"scale": scale.tolist(), "shift": shift.tolist()}},
                  lambda c: f.diagonal(scale, shift, c))


def _sign_flip(mode: str) -> Form:
    def made(place: Local) -> Change:
        dims = place.largest(0.4)
        signs = torch.where(place.noise(len(dims)) > 0, 1, -1)
        return Change({"inline": {"dims": dims, "polarity": signs.tolist(), "mode": mode}},
                      lambda c: f.sign_flip(dims, signs, mode, c))

    return made


def _mask(mode: str, index: str) -> Form:
    def made(place: Local) -> Change:
        columns = place.largest(0.3)
        values = place.vector(1.0)[:len(columns)]
        more: dict[str, dict[str, Any]] = {"zero": {}, "set": {"value": values.tolist()}, "scale": {"scale": -0.5}}

        def target(part: Tensor) -> Tensor:
            return {"zero": 0 * part, "set": values.expand_as(part), "scale": -0.5 * part}[mode]

        return Change({"inline": {index: columns, "mode": mode, **more[mode]}},
                      lambda c: f.columns_to(columns, target, c))

    return made


def _heads(place: Local) -> tuple[list[int], list[int]]:
    """Every other head, and its columns."""
    dim = place.facts.head_dim
    heads = list(range(place.number % 2, place.facts.num_heads, 2)) or [0]
    return heads, [column for head in heads for column in range(head * dim, (head + 1) * dim)]


def _head_scale(place: Local) -> Change:
    heads, columns = _heads(place)
    return Change({"inline": {"heads": heads, "scale": -0.5}},
                  lambda c: f.columns_to(columns, lambda part: -0.5 * part, c))


def _head_shift(place: Local) -> Change:
    heads, columns = _heads(place)
    shift = torch.zeros(place.seen.shape[-1])
    shift[columns] = place.vector(1.0)[columns]
    return Change({"inline": {"heads": heads, "mode": "shift",
                              "shift": shift[columns].reshape(len(heads), -1).tolist()}}, lambda c: f.add(shift, c))


def _experts(mode: str) -> Form:
    def made(place: Local) -> Change:
        # Those that this text uses most: what is done to others does not show.
        used = place.seen.mean(0).argsort(descending=True)[:max(1, min(2, place.facts.experts_per_token - 1))].tolist()
        others = [(expert + 1) % place.facts.num_experts for expert in used]
        spec: dict[str, Any] = {"experts": used, "mode": mode}
        number = {"scale": 0.3, "bias": 1.5}.get(mode, 0.0)
        if mode in ("scale", "bias"):
            spec[mode] = number
        if mode == "force":
            spec["experts"], used, others = others, others, used

        def formula(c: float) -> Function:
            if mode in ("force", "off_refill"):
                # These have no strength, so another expert stands for a wrong one.
                return f.experts(used if c == 1.0 else others, mode, number)
            return f.experts(used, mode, c * number if mode == "bias" else 1 + c * (number - 1))

        return Change({"inline": spec}, formula)

    return made


def _manifold(place: Local) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """A closed curve of five points round the mean activation."""
    basis, mean = place.basis(3), place.seen.mean(0)
    angle = torch.arange(5) * 2 * torch.pi / 5
    points = place.size * torch.stack([angle.cos(), angle.sin(), 0.3 * (2 * angle).cos()], -1)
    return ({"basis": basis.tolist(), "mean": mean.tolist(), "points": points.tolist(), "period": [5],
             "knots": [[n] for n in range(5)], "labels": list("abcde")}, basis, mean, points)


def _manifold_point(place: Local) -> Change:
    inline, basis, mean, points = _manifold(place)
    return Change({"inline": {**inline, "target": "d"}}, lambda c: f.move_to(basis, mean, points[3], c))


def _manifold_shift(place: Local) -> Change:
    inline, basis, mean, points = _manifold(place)
    return Change({"inline": {**inline, "shift": 1.5}}, lambda c: f.move_along(basis, mean, points, 1.5, c))


def _patch_whole(place: Local) -> Change:
    u = place.seen[place.number % len(place.seen)] + place.vector(0.3)
    return Change({"inline": {"vector": u.tolist()}}, lambda c: f.patch(u, c), 0.8)


def _patch_subspace(place: Local) -> Change:
    u, basis = -place.seen.mean(0), place.basis(3)
    return Change({"inline": {"basis": basis.tolist(), "mean": u.tolist()}}, lambda c: f.patch(u, c, basis))


def _sae(k: int | None, dropped: bool = False) -> Form:
    """A dictionary of directions drawn round the activations, so that features are active on some tokens. dropped: the
    reconstruction takes the place of the activation."""
    def made(place: Local) -> Change:
        width, count = place.seen.shape[-1], 24
        encoder = place.noise(count, width) / place.size
        # Half of the tokens lie on either side of each feature's bias.
        bias = -(place.seen @ encoder.T).median(dim=0).values
        decoder = place.noise(count, width) * place.size / width**0.5
        inline: dict[str, Any] = {"encoder": encoder.tolist(), "encoder_bias": bias.tolist(),
                                  "decoder": decoder.tolist(), "decoder_bias": [0.0] * width}
        if k is not None:
            inline["k"] = k
        changes = {"3": {"set": 0.5}, "11": {"add": 0.4}, "17": {"scale": 3.0}}
        formulas = {3: lambda v: torch.full_like(v, 0.5), 11: lambda v: v + 0.4, 17: lambda v: 3 * v}
        if not dropped:
            return Change({"inline": inline, "options": {"features": changes}},
                          lambda c: f.features(encoder, bias, decoder, formulas, c, k), 0.9)
        centre = place.seen.mean(0)
        inline["decoder_bias"] = centre.tolist()
        return Change({"inline": inline, "options": {"features": changes, "error": "drop"}},
                      lambda c: f.features(encoder, bias, decoder, formulas, c, k, centre), 0.9)

    return made


def _sparsify(method: str) -> Form:
    """Half of the channels: the small ones of each token, or those under thresholds of this text's own medians."""
    def made(place: Local) -> Change:
        size = place.seen.abs()
        norm = 0.5 + place.noise(size.shape[-1]).abs()
        median = size.median(dim=0).values
        cut = float((size * norm).median())
        numbers: dict[str, Any] = {"norm": norm.tolist(), "shares": [0.5], "cut": [cut],
                                   "thresholds": [median.tolist()]}
        given: dict[str, Any] = {"options": {"method": method, "share": 0.5}}
        if method != "magnitude":
            given["inline"] = numbers
        edge = {"threshold": median, "chess": cut / norm}
        return Change(given, lambda c: f.small_left_out(0.5, norm if method == "wina" else torch.ones_like(norm), c)
                      if method in ("magnitude", "wina") else
                      lambda h: torch.where(h.abs() > edge[method], h, (1 - c) * h))

    return made


FORMS: Mapping[str, Mapping[str, Form]] = {
    "add": {"plain": _add, "norm_match": _add_norm_match, "preserve_norm": _add_preserve_norm},
    "ablate": {"direction": _ablate_direction, "subspace": _ablate_subspace},
    "clamp": {"value": _clamp_value, "range": _clamp_range},
    "rotate": {"to": _rotate_to, "by": _rotate_by},
    "affine": {"low rank": _affine, "diagonal": _diagonal},
    "sign_flip": {mode: _sign_flip(mode) for mode in ("away", "toward", "flip")},
    "mask": {mode: _mask(mode, "dims") for mode in ("zero", "set", "scale")},
    "neuron_mask": {mode: _mask(mode, "neurons") for mode in ("zero", "set", "scale")},
    "head_mask": {"scale": _head_scale, "shift": _head_shift},
    "expert_mask": {mode: _experts(mode) for mode in ("off", "off_refill", "force", "scale", "bias")},
    "manifold": {"target": _manifold_point, "shift": _manifold_shift},
    "patch": {"whole": _patch_whole, "subspace": _patch_subspace},
    "sae": {"thresholds": _sae(None), "topk": _sae(6), "error dropped": _sae(6, dropped=True)},
    "sparsify": {method: _sparsify(method) for method in ("magnitude", "wina", "threshold", "chess")},
}
