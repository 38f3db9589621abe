"""Ops: one per file."""

from steering.ops import dictionaries, kernels, sparse
from steering.ops.base import Operation, Place, Row
from steering.ops.kernel import get_kernel
from steering.ops.registry import get_operation, operations

__all__ = ["Operation", "Place", "Row", "dictionaries", "get_kernel", "get_operation", "kernels", "operations",
           "sparse"]
