"""The checks that hold the metadata and the numbers of an artifact together, and both within the limits."""

from pydantic import ValidationError

from steering.artifacts.payload import WIDTH_TENSORS, Payload
from steering.language.errors import PayloadTooLarge
from steering.ops.base import RESIDUAL_SITES
from vectors.artifact import InvalidMetadata, Limits, Metadata


def check(metadata: Metadata, payload: Payload, limits: Limits) -> Metadata:
    """Check metadata against the numbers; returns it with `d_model` filled in where the numbers tell it.

    Raises:
        PayloadTooLarge: beyond one of `limits`.
        InvalidMetadata: kind, width or layers contradict the numbers.
    """
    if payload.nbytes > limits.payload_bytes:
        raise PayloadTooLarge(f"the numbers take {payload.nbytes} bytes, more than {limits.payload_bytes}",
                              param="payload", fix="Leave out layers that are not used.")
    for field, count in ((("layers",), len(payload.layers)),
                         (("metadata", "residual_norm"), len(metadata.residual_norm)),
                         (("metadata", "sigma"), len(metadata.sigma))):
        if count > limits.layers:
            raise PayloadTooLarge(f"{count} layers, more than {limits.layers}", param=field)
    check_storable(metadata, limits)
    if metadata.kind != payload.kind:
        raise InvalidMetadata(f"the metadata says {metadata.kind}, the numbers are a {payload.kind}",
                              param=("metadata", "kind"))
    _check_layers(metadata, payload)
    _check_labels(metadata, payload)
    width = _width(metadata, payload)
    if width is None or metadata.site not in RESIDUAL_SITES:
        return metadata
    if metadata.d_model is None:
        return metadata.model_copy(update={"d_model": width})
    if metadata.d_model != width:
        raise InvalidMetadata(f"d_model is {metadata.d_model}, the numbers are {width} wide",
                              param=("metadata", "d_model"))
    return metadata


def check_storable(metadata: Metadata, limits: Limits) -> None:
    """Raises PayloadTooLarge; InvalidMetadata: what would be stored could not be read back."""
    document = metadata.document()
    if len(document.encode()) > limits.document_bytes:
        raise PayloadTooLarge(f"the metadata takes more than {limits.document_bytes} bytes as JSON", param="metadata",
                              fix="Shorten provenance and card; keep reports beside the library.")
    try:
        Metadata.model_validate_json(document)
    except ValidationError as error:
        # JSON can be written deeper than it can be read.
        raise InvalidMetadata.of(error, "metadata") from error


def _check_layers(metadata: Metadata, payload: Payload) -> None:
    # With source_layer one layer's direction serves at every layer, so layers without numbers are right there.
    if not isinstance(metadata.layers, list) or metadata.options.get("source_layer") is not None:
        return
    missing = [n for n in metadata.layers if n >= 0 and n not in payload.layers]
    if missing:
        raise InvalidMetadata(f"layer {missing[0]} has no numbers", param=("metadata", "layers"),
                              fix=f"Layers with numbers: {', '.join(map(str, payload.layers))}.")


def _check_labels(metadata: Metadata, payload: Payload) -> None:
    labels = metadata.options.get("labels")
    if metadata.kind != "manifold" or not isinstance(labels, list):
        return
    for layer, tensors in payload.layers.items():
        if len(tensors["knots"]) != len(labels):
            raise InvalidMetadata(f"{len(labels)} labels for the {len(tensors['knots'])} knots of layer {layer}",
                                  param=("metadata", "options", "labels"),
                                  fix="Give one label per knot, in their order.")


def _width(metadata: Metadata, payload: Payload) -> int | None:
    """Width of the tensors, None for kinds that are sets of indices."""
    tensor = WIDTH_TENSORS.get(metadata.kind)
    if tensor is None:
        return None
    widths = {layer: tensors[tensor].shape[-1] for layer, tensors in payload.layers.items()}
    first = next(iter(widths.values()))
    for layer, width in widths.items():
        if width != first:
            raise InvalidMetadata(f"layer {layer} is {width} wide, other layers {first}", param="layers")
    return first
