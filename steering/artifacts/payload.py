"""The numbers of an artifact: which tensors each kind holds at a layer, and which rules they obey.

A payload is `layer -> tensor name -> tensor`. It is what a safetensors blob holds (under the keys `"{layer}.{name}"`),
and what `inline` in a spec is turned into. A letter stands for the length of an axis: `d` for the width of the site
(d_model, or num_heads * head_dim at head_out, or d_ff at mlp_act), `r` for a rank, `m` for a number of indices, `h` for
head_dim, `w` for a number of knots, `a` for a number of coordinates, `p` for a number of patterns of `b` bits, `q`
for a number of statistics, `f` for a number of forms, `g` for a number of shares, and `2` for a mean and a standard
deviation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from steering.artifacts.normality import MAX_WINDOW, MIN_WINDOW, NORMAL_FORMS, NUM_STATISTICS
from steering.artifacts.spline import Manifold
from steering.language.errors import InvalidPayload, Path

Kind = Literal[
    "vector", "subspace", "sign_pattern", "dim_mask", "neuron_set", "head_set", "expert_set", "affine", "probe",
    "manifold", "diagonal", "sae", "normality", "sparsity",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Kinds that are read and never applied, so that they have no op.
READ_ONLY: tuple[Kind, ...] = ("normality",)

Layers = Mapping[int, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class TensorRule:
    """What one named tensor of a kind must be. shape: one letter for each axis; see the top of this file."""

    shape: tuple[str, ...]
    integer: bool = False
    optional: bool = False


RULES: dict[Kind, dict[str, TensorRule]] = {
    "vector": {"vector": TensorRule(("d",))},
    "subspace": {"basis": TensorRule(("r", "d")), "mean": TensorRule(("d",), optional=True)},
    "sign_pattern": {"dims": TensorRule(("m",), integer=True), "polarity": TensorRule(("m",), integer=True)},
    "dim_mask": {"dims": TensorRule(("m",), integer=True), "value": TensorRule(("m",), optional=True)},
    "neuron_set": {"neurons": TensorRule(("m",), integer=True), "value": TensorRule(("m",), optional=True)},
    "head_set": {"heads": TensorRule(("m",), integer=True), "shift": TensorRule(("m", "h"), optional=True)},
    "expert_set": {"experts": TensorRule(("m",), integer=True)},
    "affine": {"up": TensorRule(("r", "d")), "down": TensorRule(("r", "d")), "bias": TensorRule(("r",))},
    "probe": {"weight": TensorRule(("d",)), "bias": TensorRule(())},
    "diagonal": {"scale": TensorRule(("d",)), "shift": TensorRule(("d",))},
    "manifold": {"basis": TensorRule(("r", "d")), "mean": TensorRule(("d",)), "knots": TensorRule(("w", "a")),
                 "points": TensorRule(("w", "r")), "period": TensorRule(("a",))},
    "sae": {"encoder": TensorRule(("m", "d")), "encoder_bias": TensorRule(("m",)), "decoder": TensorRule(("m", "d")),
            "decoder_bias": TensorRule(("d",)), "threshold": TensorRule(("m",), optional=True),
            "k": TensorRule((), integer=True, optional=True),
            "input_norm": TensorRule((), integer=True, optional=True)},
    "normality": {"mean": TensorRule(("d",)), "scale": TensorRule(("d",)), "basis": TensorRule(("r", "d")),
                  "variance": TensorRule(("r",)), "rest": TensorRule(()), "patterns": TensorRule(("p", "b")),
                  "window": TensorRule((), integer=True), "dimension": TensorRule(()), "bandwidth": TensorRule(()),
                  "spectral_mean": TensorRule(("q",)), "spectral_whiten": TensorRule(("q", "q")),
                  "diffusion": TensorRule(("2",)), "thresholds": TensorRule(("f",))},
    "sparsity": {"norm": TensorRule(("d",)), "shares": TensorRule(("g",), optional=True),
                 "cut": TensorRule(("g",), optional=True), "thresholds": TensorRule(("g", "d"), optional=True)},
}

# The tensor whose last axis is as wide as the site; other kinds are sets of indices.
WIDTH_TENSORS: dict[Kind, str] = {"vector": "vector", "subspace": "basis", "affine": "up", "probe": "weight",
                                  "manifold": "basis", "diagonal": "scale", "sae": "decoder",
                                  "normality": "basis", "sparsity": "norm"}

# How an SAE scales each token before it reads it; see `dictionary.Dictionary`.
INPUT_NORMS = {"none": 0, "constant": 1, "layer": 2}

# The tensor that holds the indices of kinds that are sets.
INDEX_NAMES = {"sign_pattern": "dims", "dim_mask": "dims", "neuron_set": "neurons", "head_set": "heads",
               "expert_set": "experts"}


@dataclass(frozen=True)
class Payload:
    """Validated numbers of one artifact. Floating tensors are float32, index tensors int64, all on the CPU."""

    kind: Kind
    layers: Layers

    @classmethod
    def build(cls, kind: Kind, layers: Mapping[int, Mapping[str, torch.Tensor]]) -> "Payload":
        """Check every tensor of every layer.

        Raises:
            InvalidPayload: naming the layer and tensor that is wrong.
        """
        if kind not in RULES:
            raise InvalidPayload(f"unknown artifact kind {kind!r}", param="kind", fix=f"Use one of {', '.join(KINDS)}.")
        if not layers:
            raise InvalidPayload("an artifact needs numbers for at least one layer", param="layers")
        return cls(kind, {int(n): _check_layer(kind, int(n), tensors) for n, tensors in sorted(layers.items())})

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for tensors in self.layers.values() for t in tensors.values())

    @property
    def width(self) -> int | None:
        """The width of the site it was made for; None for kinds that are sets of indices, which do not store it."""
        name = WIDTH_TENSORS.get(self.kind)
        return None if name is None else next(iter(self.layers.values()))[name].shape[-1]

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Flat form for safetensors, which refuses tensors that share memory: `{"3.vector": tensor}`."""
        return {f"{n}.{name}": t.clone(memory_format=torch.contiguous_format)
                for n, tensors in self.layers.items() for name, t in tensors.items()}

    @classmethod
    def from_tensors(cls, kind: Kind, flat: Mapping[str, torch.Tensor]) -> "Payload":
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in flat.items():
            number, _, name = key.partition(".")
            if not (number.isascii() and number.isdigit() and len(number) <= 6 and name):
                raise InvalidPayload(f"tensor name {key[:80]!r} is not of the form LAYER.NAME", param="tensors",
                                     fix='Name tensors like "3.vector".')
            layers.setdefault(int(number), {})[name] = tensor
        return cls.build(kind, layers)


def _check_layer(kind: Kind, layer: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rules = RULES[kind]
    where = ("layers", layer)
    if layer < 0:
        raise InvalidPayload(f"layer {layer} is negative", param=where)
    unknown = sorted(set(tensors) - set(rules))
    if unknown:
        raise InvalidPayload(f"a {kind} has no tensor {unknown[0][:80]!r}", param=where,
                             fix=f"It holds {', '.join(rules)}.")
    sizes: dict[str, int] = {}
    checked: dict[str, torch.Tensor] = {}
    for name, rule in rules.items():
        if name not in tensors:
            if rule.optional:
                continue
            raise InvalidPayload(f"a {kind} needs the tensor {name!r}", param=(*where, name))
        checked[name] = _check_tensor(tensors[name], rule, sizes, (*where, name))
    _check_meaning(kind, checked, where)
    return checked


def _check_tensor(tensor: torch.Tensor, rule: TensorRule, sizes: dict[str, int], where: Path) -> torch.Tensor:
    if tensor.ndim != len(rule.shape):
        raise InvalidPayload(f"expected {len(rule.shape)} axes ({', '.join(rule.shape)}), got shape "
                             f"{list(tensor.shape)}", param=where)
    for letter, size in zip(rule.shape, tensor.shape, strict=True):
        if size == 0:
            raise InvalidPayload("the tensor is empty", param=where)
        if sizes.setdefault(letter, size) != size:
            raise InvalidPayload(f"axis {letter!r} has size {size} here and {sizes[letter]} in another tensor",
                                 param=where)
    if rule.integer:
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
            raise InvalidPayload(f"expected whole numbers, got {tensor.dtype}", param=where)
        return tensor.detach().to("cpu", torch.int64)
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise InvalidPayload(f"expected real numbers, got {tensor.dtype}", param=where)
    values = tensor.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise InvalidPayload("contains NaN or infinity", param=where)
    return values


def _check_meaning(kind: Kind, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    index_name = INDEX_NAMES.get(kind)
    if index_name is not None:
        index = tensors[index_name]
        if int(index.min()) < 0:
            raise InvalidPayload("indices must not be negative", param=(*where, index_name))
        if len(set(index.tolist())) != index.numel():
            raise InvalidPayload("an index occurs twice", param=(*where, index_name))
    if kind == "sign_pattern" and not bool((tensors["polarity"].abs() == 1).all()):
        raise InvalidPayload("polarity must be +1 or -1", param=(*where, "polarity"))
    if kind in ("vector", "probe"):
        name = "vector" if kind == "vector" else "weight"
        if not bool(tensors[name].any()):
            raise InvalidPayload("the vector is zero and would do nothing", param=(*where, name))
    if kind == "normality":
        _check_normality(tensors, where)
    if kind == "sparsity":
        _check_sparsity(tensors, where)
    if "basis" in tensors:
        _check_basis(tensors["basis"].double(), (*where, "basis"))
    if kind == "sae":
        _check_dictionary(tensors, where)
    if kind == "manifold":
        try:
            Manifold.build(tensors["knots"], tensors["points"], tensors["period"])
        except InvalidPayload as error:
            raise error.at(*where) from None


def _check_dictionary(tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    if "k" in tensors and "threshold" in tensors:
        raise InvalidPayload("an SAE has either thresholds or a k", param=(*where, "k"), fix="Leave one of them out.")
    features = len(tensors["decoder"])
    if "k" in tensors and not 1 <= int(tensors["k"]) <= features:
        raise InvalidPayload(f"k is {int(tensors['k'])}, and there are {features} features", param=(*where, "k"))
    if "input_norm" in tensors and int(tensors["input_norm"]) not in INPUT_NORMS.values():
        known = ", ".join(f"{number} ({name})" for name, number in INPUT_NORMS.items())
        raise InvalidPayload(f"input_norm is {int(tensors['input_norm'])}", param=(*where, "input_norm"),
                             fix=f"Known are {known}.")


def _check_normality(tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    positive = ("scale", "variance", "rest", "dimension", "bandwidth")
    for name in positive:
        if not bool((tensors[name] > 0).all()):
            raise InvalidPayload("expected numbers above zero", param=(*where, name))
    sizes = {"spectral_mean": NUM_STATISTICS, "diffusion": 2, "thresholds": len(NORMAL_FORMS)}
    for name, size in sizes.items():
        if len(tensors[name]) != size:
            raise InvalidPayload(f"expected {size} numbers, got {len(tensors[name])}", param=(*where, name))
    if not MIN_WINDOW <= int(tensors["window"]) <= MAX_WINDOW:
        raise InvalidPayload(f"a window has {MIN_WINDOW} to {MAX_WINDOW} tokens", param=(*where, "window"))
    if tensors["patterns"].shape[1] > tensors["basis"].shape[0]:
        raise InvalidPayload("patterns have more bits than the basis has rows", param=(*where, "patterns"))
    if not bool((tensors["patterns"].abs() == 1).all()):
        raise InvalidPayload("bits of patterns must be +1 or -1", param=(*where, "patterns"))
    if not bool((tensors["diffusion"][1] > 0).all()):
        raise InvalidPayload("the standard deviation must be above zero", param=(*where, "diffusion"))


def _check_sparsity(tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    for name in ("norm", "cut", "thresholds"):
        if name in tensors and not bool((tensors[name] >= 0).all()):
            raise InvalidPayload("expected no number below zero", param=(*where, name))
    shares = tensors.get("shares")
    if shares is None:
        return
    if not bool(((shares > 0) & (shares < 1)).all()) or not bool((shares.diff() > 0).all()):
        raise InvalidPayload("shares lie between 0 and 1 and rise", param=(*where, "shares"))


def _check_basis(basis: torch.Tensor, where: Path) -> None:
    if basis.shape[0] > basis.shape[1]:
        raise InvalidPayload(f"{basis.shape[0]} rows of width {basis.shape[1]} cannot be orthonormal", param=where)
    gram = basis @ basis.T
    if not torch.allclose(gram, torch.eye(len(basis), dtype=gram.dtype), atol=1e-3):
        raise InvalidPayload("basis rows must be orthonormal (unit length, pairwise perpendicular)", param=where,
                             fix="Orthonormalise them, with a QR decomposition say.")
