"""Builders shared by the tests of the library."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import event

from steering.artifacts.payload import Payload
from tests.postgres import Cluster
from tests.sqlite import library_url
from vectors import Library, Metadata
from vectors.library.database import Database


class Place:
    """Where the libraries of a test are: SQLite files, or databases of a cluster of PostgreSQL where there is one."""

    def __init__(self) -> None:
        self.cluster: Cluster | None = None
        self.opened: list[Database] = []

    def url(self, folder: Path, *, empty: bool = False) -> str:
        """Of the database that belongs to a folder. empty: without tables, where it is asked for first."""
        if self.cluster is None:
            return f"sqlite:///{folder}/library.db" if empty else library_url(folder)
        return self.cluster.url(folder) if empty else self.cluster.library_url(folder)

    def close(self) -> None:
        """Whatever a test left open. A connection that is left to the garbage collector is complained about."""
        for database in self.opened:
            database.close()
        self.opened.clear()


PLACE = Place()


def open_library(folder: Path, *, blob_url: str | None = None, **arguments: Any) -> Library:
    library = Library.open(PLACE.url(folder), blob_url or str(folder / "blobs"), **arguments)
    PLACE.opened.append(library._database)
    return library


def open_database(folder: Path) -> Database:
    database = Database(PLACE.url(folder, empty=True))
    PLACE.opened.append(database)
    return database


def execute(library: Library, statement: str) -> None:
    """What somebody with the database does to it, past the library."""
    with library._database.engine.begin() as connection:
        connection.exec_driver_sql(statement)


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
        "sae": ("sae", "resid_pre", lambda: {
            "encoder": torch.randn(24, 16), "encoder_bias": torch.randn(24), "decoder": torch.randn(24, 16),
            "decoder_bias": torch.randn(16), "threshold": torch.rand(24), "input_norm": torch.tensor(1)}),
        "normality": (None, "resid_post", normality_numbers),
        "sparsity": ("sparsify", "mlp_act", lambda: {
            "norm": torch.rand(16), "shares": torch.tensor([0.25, 0.5]), "cut": torch.tensor([0.1, 0.4]),
            "thresholds": torch.rand(2, 16)}),
        "probe": ("clamp", "attn_out", lambda: {"weight": torch.randn(16), "bias": torch.tensor(0.5)}),
    }
    return {kind: (metadata(f"a-{kind.replace('_', '-')}", kind=kind, op=op, site=site),
                   Payload.build(kind, both(make)))  # type: ignore[arg-type]
            for kind, (op, site, make) in numbers.items()}


def normality_numbers(width: int = 16) -> dict[str, torch.Tensor]:
    """Of a layer."""
    return {"mean": torch.randn(width), "scale": torch.rand(width) + 0.5,
            "basis": torch.linalg.qr(torch.randn(width, 4))[0].T.contiguous(), "variance": torch.rand(4) + 0.1,
            "rest": torch.tensor(0.3), "patterns": torch.randint(0, 2, (5, 3)) * 2.0 - 1, "window": torch.tensor(8),
            "dimension": torch.tensor(6.0), "bandwidth": torch.tensor(2.0), "spectral_mean": torch.randn(6),
            "spectral_whiten": torch.randn(6, 6), "diffusion": torch.tensor([1.0, 0.2]), "thresholds": torch.ones(5)}


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
