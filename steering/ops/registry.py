"""The ops of the language. Each stands in the file of its name, as OPERATION."""

from collections.abc import Mapping
from importlib import import_module

from steering.language.vocabulary import OPS, Op
from steering.ops.base import Operation


def _load(name: Op) -> Operation:
    operation = import_module(f"steering.ops.{name}").OPERATION
    if not isinstance(operation, Operation) or operation.name != name:
        raise ValueError(f"steering.ops.{name}.OPERATION is no op of that name")
    return operation


_OPERATIONS: Mapping[Op, Operation] = {name: _load(name) for name in OPS}


def get_operation(name: Op) -> Operation:
    return _OPERATIONS[name]


def operations() -> tuple[Operation, ...]:
    """All of them, in the order of the language."""
    return tuple(_OPERATIONS.values())
