"""From the `inline` field of an intervention to a payload and options."""

import base64
import binascii
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from steering.artifacts.payload import RULES, Kind, Payload
from steering.language.errors import InvalidPayload, InvalidSpec, Path, PayloadTooLarge
from steering.language.intervention import Encoded
from steering.models.facts import ModelFacts
from steering.ops.base import Operation

MAX_NUMBERS = 2**22


def split_inline(inline: Mapping[str, Any], operation: Operation) -> tuple[dict[str, Any], dict[str, Any]]:
    """`inline` parted into tensors and options of the op.

    Raises:
        InvalidSpec: for a key that is neither.
    """
    tensor_names = {name for kind in operation.kinds for name in RULES[kind]}
    option_names = set(operation.options.model_fields)
    for key in inline:
        if key not in tensor_names | option_names:
            close = difflib.get_close_matches(key, tensor_names | option_names, 1)
            raise InvalidSpec(f"unknown field {key!r} for op {operation.name}", param=("inline", key),
                              fix=f"Did you mean {close[0]!r}?" if close else
                              f"Known: {', '.join(sorted(tensor_names | option_names))}.")
    tensors = {key: value for key, value in inline.items() if key in tensor_names}
    return tensors, {key: value for key, value in inline.items() if key in option_names - tensor_names}


def inline_payload(tensors: Mapping[str, Any], operation: Operation, layers: Sequence[int] | None, facts: ModelFacts
                   ) -> Payload:
    """Payload of inline tensors. Values given without layers stand at every layer of `layers`.

    Raises:
        InvalidPayload, InvalidSpec, PayloadTooLarge: naming the tensor.
    """
    kind = _kind_of(set(tensors), operation)
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    budget = MAX_NUMBERS
    for name, value in tensors.items():
        where = ("inline", name)
        placed = isinstance(value, Mapping) and "base64" not in value
        if placed:
            parts = {_layer(key, facts, where): item for key, item in value.items()}
            if len(parts) < len(value):
                raise InvalidPayload("a layer occurs twice", param=where)
        elif layers is None:
            raise InvalidSpec("layers are missing", param="layers",
                              fix='Give "layers", or write the numbers per layer: {"3": [...]}.')
        else:
            parts = dict.fromkeys(layers, value)
        if not parts:
            raise InvalidPayload("no layer is given", param=where)
        converted: dict[int, torch.Tensor] = {}
        for layer, item in parts.items():
            tensor = next((converted[n] for n in converted if parts[n] is item), None)
            if tensor is None:
                tensor = parse_tensor(item, (*where, layer) if placed else where)
                budget -= tensor.numel()
                if budget < 0:
                    raise PayloadTooLarge(f"more than {MAX_NUMBERS} inline numbers", param=where,
                                          fix="Store them as an artifact and name it.")
            converted[layer] = tensor
            by_layer.setdefault(layer, {})[name] = tensor
    try:
        return Payload.build(kind, by_layer)
    except InvalidPayload as error:
        raise error.at("inline") from None


def parse_options(operation: Operation, given: Mapping[str, Any]) -> Any:
    """The op's options model.

    Raises:
        InvalidSpec: naming the option.
    """
    try:
        return operation.options.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(operation.options.model_fields) or "none"
        raise InvalidSpec(first["msg"].removeprefix("Value error, "), param=("options", *first["loc"]),
                          fix=f"Options of {operation.name}: {known}.") from None


def _kind_of(names: set[str], operation: Operation) -> Kind:
    for kind in operation.kinds:
        rules = RULES[kind]
        required = {name for name, rule in rules.items() if not rule.optional}
        if required <= names <= set(rules):
            return kind
    forms = " or ".join("+".join(RULES[kind]) for kind in operation.kinds)
    raise InvalidSpec(f"op {operation.name} takes {forms}, got {'+'.join(sorted(names)) or 'nothing'}", param="inline")


def _layer(key: str, facts: ModelFacts, where: Path) -> int:
    text = str(key)
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5):
        raise InvalidPayload(f"{text[:40]!r} is not a layer number", param=where)
    return facts.check_layer(int(text), where)


def parse_tensor(value: Any, where: Path) -> torch.Tensor:
    if isinstance(value, Mapping):
        return _decoded(value, where)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise InvalidPayload("not a rectangular list of numbers", param=where) from None
    if array.dtype.kind not in "if" or array.ndim > 3:
        raise InvalidPayload("not a rectangular list of numbers", param=where)
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def _decoded(value: Mapping[str, Any], where: Path) -> torch.Tensor:
    try:
        encoded = Encoded.model_validate(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidPayload(first["msg"], param=(*where, *first["loc"])) from None
    try:
        raw = base64.b64decode(encoded.base64, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidPayload("not valid base64", param=(*where, "base64")) from None
    dtype = np.dtype(encoded.dtype).newbyteorder("<")
    count = int(np.prod(encoded.shape, dtype=object)) if encoded.shape else 1
    if len(raw) != count * dtype.itemsize:
        raise InvalidPayload(f"{len(raw)} bytes do not make {count} numbers of {encoded.dtype}",
                             param=(*where, "base64"))
    array = np.frombuffer(raw, dtype=dtype).reshape(encoded.shape)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=True))
