"""From the tensors of an SAE's file, as any of the known programs writes them, to an artifact."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidPayload, PayloadTooLarge
from vectors.artifact import Limits, Metadata
from vectors.formats.dictionaries.folding import Raw, folded
from vectors.formats.dictionaries.layouts import IDLE, Conventions, overridden, recognised
from vectors.formats.dictionaries.said import FIELD, SaeFields, layer_said, split

NAMES: Mapping[str, tuple[str, ...]] = {
    "encoder": ("W_enc", "w_enc", "encoder.weight", "encoder_linear.weight"),
    "decoder": ("W_dec", "w_dec", "decoder.weight", "decoder_linear.weight"),
    "encoder_bias": ("b_enc", "encoder.bias", "encoder_linear.bias", "b_mag", "mag_bias"),
    "decoder_bias": ("b_dec", "decoder.bias", "decoder_linear.bias", "bias", "decoder_bias"),
    "threshold": ("threshold",), "log_threshold": ("log_threshold", "log_jumprelu_threshold"), "k": ("k",),
    "gate_bias": ("b_gate", "gate_bias"), "magnitude": ("r_mag",),
    "output": ("scaling_factor", "finetuning_scaling_factor")}
_ENCODERS = frozenset(NAMES["encoder"])
MOST_TENSORS = 32


def is_dictionary(names: object) -> bool:
    """Whether these are names of the tensors of an SAE's file."""
    return isinstance(names, Mapping) and bool(_ENCODERS & set(names))


def read_dictionary(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], limits: Limits,
                    path_says: tuple[Any, Any] = (None, None)) -> tuple[Metadata, Payload]:
    """
    Args:
        fields: metadata that wins over the file, and under `sae` what stands beside it; see `SaeFields`.
        path_says: site and layer by the folders the file lies in, where it does not say them itself.

    Raises:
        InvalidPayload, InvalidMetadata, InvalidRequest, PayloadTooLarge.
    """
    said, given = split(fields)
    if len(tensors) > MOST_TENSORS:
        raise InvalidPayload(f"{len(tensors)} tensors are more than an SAE has", param="file")
    plain = {name: tensor for name, tensor in tensors.items() if name not in IDLE}
    found = overridden(recognised(plain, said.config), said.model_dump(
        exclude_none=True, include={"subtract_decoder_bias", "scale", "input_norm", "activation", "k", "threshold"}))
    layer = layer_said(given)
    layer = layer if layer is not None else found.layer if found.layer is not None else path_says[1]
    site = given.get("site") or found.site or path_says[0]
    if layer is None or site is None:
        lacking = "layer" if layer is None else "site"
        raise InvalidPayload(f"nothing says which {lacking} the SAE is of", param=("metadata", "layers" if layer is None
                             else "site"), fix='Give both with the metadata: {"site": "resid_post", "layers": [12]}.')
    raw = _raw(plain, found)
    if 8 * raw.encoder.numel() > limits.payload_bytes:
        raise PayloadTooLarge(f"the SAE takes {8 * raw.encoder.numel()} bytes, more than {limits.payload_bytes}",
                              param="file", fix="Take a smaller one, or raise max_upload_bytes.")
    made = {name: value for name, value in found.notes.items() if isinstance(value, str | int | float | dict)}
    recorded = {"kind": "sae", "op": "sae", "site": site, "layers": [layer], "provenance": {
        "method": "unknown", "source_format": found.layout, "sae": {
            **made, "subtract_decoder_bias": raw.subtracted, "scale": raw.scale, "input_norm": raw.norm}}}
    metadata = Metadata.parse({**recorded, **given})
    return metadata, Payload.build("sae", {layer: folded(raw)})


def _raw(tensors: Mapping[str, Tensor], found: Conventions) -> Raw:
    named: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    known = {other: name for name, others in NAMES.items() for other in others}
    for other, tensor in tensors.items():
        name = known.get(other)
        if name is None:
            raise InvalidPayload(f"the tensor {other[:80]!r} has no place in an SAE that is known", param="file",
                                 fix="Leave it out if it does not enter what the SAE computes.")
        if name in named:
            raise InvalidPayload(f"the file has the {name.replace('_', ' ')} under two names", param="file")
        if tensor.dtype.is_complex or tensor.dtype == torch.bool or not bool(tensor.float().isfinite().all()):
            raise InvalidPayload(f"the tensor {other[:80]!r} holds what is no finite number", param="file")
        named[name], origin[name] = tensor, other
    for name in ("encoder", "decoder", "decoder_bias"):
        if name not in named:
            raise InvalidPayload(f"the SAE has no {name.replace('_', ' ')}", param="file",
                                 fix=f"It is looked for as {', '.join(NAMES[name])}.")
    width = named["decoder_bias"].numel()
    # A weight of torch's linear layer has a row for each of its outputs. Others write x W.
    encoder = _rows(named["encoder"], width, "encoder", by_columns=(
        not origin["encoder"].endswith(".weight") and found.layout != "bare"))
    decoder = _rows(named["decoder"], width, "decoder", by_columns=(
        origin["decoder"].endswith(".weight") or found.layout == "bare"))
    features = len(encoder)
    if len(decoder) != features:
        raise InvalidPayload(f"the encoder has {features} features, the decoder {len(decoder)}", param="file")
    threshold = _threshold(named, found, features)
    k = _k(named, found)
    return Raw(
        encoder, decoder, _each(named, "encoder_bias", features, torch.zeros(features)),
        named["decoder_bias"].reshape(-1), _told(found.subtracted, "subtract_decoder_bias", "true or false"),
        _told(found.scale, "scale", "the release's factor (norm_scaling_factor)"), found.norm, k, threshold,
        found.decoder_norms, _optional(named, "gate_bias", features), _optional(named, "magnitude", features),
        _optional(named, "output", features))


def _rows(matrix: Tensor, width: int, what: str, *, by_columns: bool) -> Tensor:
    """A matrix as `[features, width]`. Only a square one leaves open which way it lies; then its maker's way counts."""
    if matrix.ndim != 2 or width not in matrix.shape:
        raise InvalidPayload(f"the {what} has the shape {list(matrix.shape)}, and activations are {width} wide",
                             param="file")
    if matrix.shape[0] == matrix.shape[1]:
        return matrix.T if by_columns else matrix
    return matrix if matrix.shape[1] == width else matrix.T


def _threshold(named: Mapping[str, Tensor], found: Conventions, features: int) -> Tensor | None:
    if found.activation != "jumprelu" and found.activation is not None:
        return None
    if found.threshold is not None:
        return torch.full((features,), found.threshold, dtype=torch.float64)
    if "log_threshold" in named:
        return _each(named, "log_threshold", features).double().exp()
    if "threshold" in named:
        return _each(named, "threshold", features)
    if found.activation == "jumprelu":
        raise InvalidPayload("the SAE has no threshold", param=("metadata", FIELD, "threshold"),
                             fix="Give one for all features, or another activation.")
    return None


def _k(named: Mapping[str, Tensor], found: Conventions) -> int | None:
    if found.activation not in ("topk", None):
        return None
    k = found.k if found.k is not None else int(named["k"]) if "k" in named else None
    if k is None or isinstance(k, bool) or not isinstance(k, int):
        what = "its k" if found.activation == "topk" else "its activation: relu, jumprelu, or topk with a k"
        raise InvalidPayload(f"nothing says {what}", param=("metadata", FIELD, "k"),
                             fix='Give it with the metadata: {"sae": {"activation": "topk", "k": 50}}.')
    return k


def _each(named: Mapping[str, Tensor], name: str, features: int, default: Tensor | None = None) -> Tensor:
    """`[features]`; one number stands for all."""
    tensor = named.get(name, default)
    assert tensor is not None
    if tensor.numel() == 1:
        return tensor.reshape(()).expand(features)
    if tensor.numel() != features:
        raise InvalidPayload(f"the {name.replace('_', ' ')} has {tensor.numel()} numbers for {features} features",
                             param="file")
    return tensor.reshape(-1)


def _optional(named: Mapping[str, Tensor], name: str, features: int) -> Tensor | None:
    return _each(named, name, features) if name in named else None


def _told(value: Any, name: str, form: str) -> Any:
    if value is None:
        raise InvalidPayload(f"nothing says {name.replace('_', ' ')} of the SAE, and with the wrong one its numbers "
                             "mean nothing", param=("metadata", FIELD, name), fix=f"Give {form}.")
    return value


__all__ = ["SaeFields", "is_dictionary", "read_dictionary"]
