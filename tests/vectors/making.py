"""Builders shared by the tests of the library."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import event

from steering.artifacts.payload import Payload
from vectors import Library, Metadata


def open_library(folder: Path, **arguments: Any) -> Library:
    return Library.open(f"sqlite:///{folder}/library.db", str(folder / "blobs"), **arguments)


def vector_payload(seed: int, layers: tuple[int, ...] = (1, 3), width: int = 8) -> Payload:
    generator = torch.Generator().manual_seed(seed)
    return Payload.build("vector", {n: {"vector": torch.randn(width, generator=generator)} for n in layers})


def metadata(name: str = "cheerful", **fields: Any) -> Metadata:
    return Metadata.parse({"name": name, "kind": "vector", "op": "add", "site": "resid_post", **fields})


def every_kind() -> dict[str, tuple[Metadata, Payload]]:
    """One artifact of each kind with all optional tensors, over two layers of different numbers."""
    torch.manual_seed(5)

    def both(make: Any) -> dict[int, dict[str, torch.Tensor]]:
        return {0: make(), 7: make()}

    def index(count: int, limit: int = 32) -> torch.Tensor:
        return torch.randperm(limit)[:count]

    numbers = {
        "vector": ("add", "resid_post", lambda: {"vector": torch.randn(16)}),
        "subspace": ("rotate", "resid_pre", lambda: {"basis": torch.linalg.qr(torch.randn(16, 3))[0].T.contiguous(),
                                                     "mean": torch.randn(16)}),
        "sign_pattern": ("sign_flip", "resid_post", lambda: {
            "dims": index(5), "polarity": torch.randint(0, 2, (5,)) * 2 - 1}),
        "dim_mask": ("mask", "mlp_out", lambda: {"dims": index(4), "value": torch.randn(4)}),
        "neuron_set": ("neuron_mask", "mlp_act", lambda: {"neurons": index(6), "value": torch.randn(6)}),
        "head_set": ("head_mask", "head_out", lambda: {"heads": index(2, 4), "shift": torch.randn(2, 4)}),
        "expert_set": ("expert_mask", "router", lambda: {"experts": index(3, 8)}),
        "affine": ("affine", "resid_post", lambda: {"up": torch.randn(2, 16), "down": torch.randn(2, 16),
                                                    "bias": torch.randn(2)}),
        "diagonal": ("affine", "mlp_out", lambda: {"scale": torch.randn(16), "shift": torch.randn(16)}),
        "manifold": ("manifold", "resid_post", lambda: {
            "basis": torch.linalg.qr(torch.randn(16, 3))[0].T.contiguous(), "mean": torch.randn(16),
            "knots": torch.arange(5.0).unsqueeze(1), "points": torch.randn(5, 3), "period": torch.tensor([5.0])}),
        "probe": ("clamp", "attn_out", lambda: {"weight": torch.randn(16), "bias": torch.tensor(0.5)}),
    }
    return {kind: (metadata(f"a-{kind.replace('_', '-')}", kind=kind, op=op, site=site),
                   Payload.build(kind, both(make)))  # type: ignore[arg-type]
            for kind, (op, site, make) in numbers.items()}


def same_numbers(first: Payload, second: Payload) -> bool:
    return (first.kind == second.kind and list(first.layers) == list(second.layers) and all(
        list(first.layers[n]) == list(second.layers[n]) and all(
            first.layers[n][t].dtype == second.layers[n][t].dtype and torch.equal(first.layers[n][t],
                                                                                  second.layers[n][t])
            for t in first.layers[n]) for n in first.layers))


class Queries:
    """Statements that were sent to a database."""

    def __init__(self) -> None:
        self.statements: list[str] = []

    @property
    def count(self) -> int:
        return len(self.statements)


@contextmanager
def queries(library: Library) -> Iterator[Queries]:
    """Statements that are sent to the database meanwhile."""
    found = Queries()

    def sent(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        found.statements.append(statement)

    engine = library._database.engine
    event.listen(engine, "before_cursor_execute", sent)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", sent)
