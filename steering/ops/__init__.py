"""Ops: one per file, registered by importing it here."""

from steering.ops import (
    ablate,
    add,
    affine,
    clamp,
    expert_mask,
    head_mask,
    kernels,
    manifold,
    mask,
    patch,
    rotate,
    sign_flip,
)
from steering.ops.base import Operation, Place, Row, get_operation, operations
from steering.ops.kernel import get_kernel

__all__ = ["Operation", "Place", "Row", "ablate", "add", "affine", "clamp", "expert_mask", "get_kernel",
           "get_operation", "head_mask", "kernels", "manifold", "mask", "operations", "patch", "rotate", "sign_flip"]
