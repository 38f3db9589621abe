"""Captured activations on the disk: each has an id, belongs to a tenant, and goes after its time."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from server.activations.table import FAILED, Column, Table, size_of
from server.errors import FilesFull
from server.shelf import Shelf
from steering.language.vocabulary import Site
from vectors.storage_errors import storing


class Activations(BaseModel):
    """What is told of captured activations."""

    id: str
    object: Literal["activations"] = "activations"
    created_at: int = Field(description="Seconds since 1970.")
    expires_at: int
    model: str
    fingerprint: str = Field(description="Of the weights.")
    texts: int
    tokens: int = Field(description="Of all texts.")
    rows: int = Field(description="Of every tensor of the file.")
    sites: dict[Site, list[int]] = Field(description="Sites and layers; the file has a tensor SITE.LAYER of each.")
    pool: Literal["none", "mean"]
    dtype: Literal["float32", "float16", "bfloat16"]
    bytes: int
    applied: list[str] = Field(description="What steered the model meanwhile.")
    disabled: str | None = Field(default=None, description="Why the steering that was asked for did not act.")
    tenant: str = Field(description="Whose they are.")


class StoredActivations(Shelf[Activations]):
    """Methods block: call them in a thread. Several servers may share the folder."""

    def __init__(self, folder: Path, *, most_bytes: int, seconds: float, now: Callable[[], float] = time.time) -> None:
        super().__init__(folder, Activations, ids=r"act-[0-9a-f]{24}", content="safetensors", several="activations",
                         param="id", seconds=seconds, now=now)
        self._most_bytes = most_bytes
        self._taking_room = threading.Lock()

    def check_room(self, columns: Mapping[str, Column], told: Mapping[str, str]) -> int:
        """Bytes that the file will take. Raises FilesFull."""
        wanted, held = size_of(columns, told), self.held()
        if held + wanted > self._most_bytes:
            raise FilesFull(f"the activations would take {wanted} bytes, and the limit on all of them is "
                            f"{self._most_bytes}, of which {max(self._most_bytes - held, 0)} are free", param="input",
                            fix="Ask for fewer layers or positions or for a smaller dtype, delete some, or raise "
                                "activations_bytes.")
        return wanted

    @contextmanager
    def writing(self, described: Activations, columns: Mapping[str, Column], told: Mapping[str, str]
                ) -> Iterator[Table]:
        """A table to fill. It is kept where what is inside ends well, and leaves nothing where it fails.

        Raises:
            FilesFull.
        """
        partial = self.partial(described.id)
        try:
            # What is being written counts as held, because its space is taken at once.
            with storing(FAILED), self._taking_room:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.check_room(columns, told)
                table = Table(partial, columns, told)
            try:
                yield table
            finally:
                table.close()
            self.place(described, described.tenant)
        except BaseException:
            self.discard(described.id)
            raise


def new_id() -> str:
    return f"act-{secrets.token_hex(12)}"
