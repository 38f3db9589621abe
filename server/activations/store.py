"""Captured activations on the disk: each has an id, belongs to a tenant, and goes after its time."""

import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import structlog
from pydantic import BaseModel, Field, ValidationError

from server.activations.table import FAILED, Column, Table, size_of
from server.errors import FilesFull
from steering.language.errors import NotFound
from steering.language.vocabulary import Site
from vectors.library.audit.notes import maker
from vectors.library.spaces import READER
from vectors.storage_errors import storing

log = structlog.get_logger("trimtab.activations")
_ID = re.compile(r"act-[0-9a-f]{24}")
# What was not written to for so long belongs to a job that is gone.
LEFT_BEHIND_S = 86400.0


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


class StoredActivations:
    """Methods block: call them in a thread. Several servers may share the folder.

    Raises of all methods: StorageUnavailable, StorageFull.
    """

    def __init__(self, folder: Path, *, most_bytes: int, seconds: float, now: Callable[[], float] = time.time) -> None:
        self._folder, self._most_bytes, self._seconds, self._now = folder, most_bytes, seconds, now
        self._taking_room = threading.Lock()

    def expiry(self, seconds: float | None) -> tuple[int, int]:
        """When something made now was made, and when it goes."""
        now = self._now()
        return int(now), int(now + min(seconds or self._seconds, self._seconds))

    def check_room(self, columns: Mapping[str, Column], told: Mapping[str, str]) -> int:
        """Bytes that the file will take. Raises FilesFull."""
        wanted, held = size_of(columns, told), self._held()
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
        partial = self._path(described.id, "partial")
        try:
            # What is being written counts as held, because its space is taken at once.
            with storing(FAILED), self._taking_room:
                self._folder.mkdir(parents=True, exist_ok=True)
                self.check_room(columns, told)
                table = Table(partial, columns, told)
            try:
                yield table
            finally:
                table.close()
            with storing(FAILED):
                os.replace(partial, self._path(described.id, "safetensors"))
                partial.write_text(described.model_dump_json())
                # With this they are there.
                os.replace(partial, self._path(described.id, "json"))
        except BaseException:
            self._remove(described.id)
            raise

    def find(self, id: str) -> Activations:
        """Raises NotFound: there are none, or they are another tenant's."""
        found = self._read(self._path(id, "json")) if _ID.fullmatch(id) else None
        if found is None or not READER.get().sees(found.tenant):
            raise NotFound(f"there are no activations {id[:64]!r}", param="id",
                           fix="They were deleted, or their time is over.")
        return found

    def content(self, id: str) -> Path:
        """Raises NotFound."""
        self.find(id)
        return self._path(id, "safetensors")

    def all(self) -> list[Activations]:
        """Those of the tenant, newest first."""
        found = [one for one in self._all() if READER.get().sees(one.tenant)]
        return sorted(found, key=lambda one: (one.created_at, one.id), reverse=True)

    def delete(self, id: str) -> Activations:
        """Raises NotFound."""
        found = self.find(id)
        self._remove(id)
        return found

    def sweep(self) -> None:
        """Remove those whose time is over, and what killed servers left half written."""
        self._all()
        for path in self._folder.glob("act-*.*"):
            with suppress(OSError):
                described = path.with_suffix(".json").exists()
                if not described and self._now() - path.stat().st_mtime > LEFT_BEHIND_S:
                    path.unlink()

    def _held(self) -> int:
        """Bytes that whole and half-written files take."""
        self._all()
        held = 0
        for pattern in ("act-*.safetensors", "act-*.partial"):
            for path in self._folder.glob(pattern):
                with suppress(FileNotFoundError):
                    held += path.stat().st_size
        return held

    def _all(self) -> list[Activations]:
        with storing("activations cannot be listed"):
            return [one for path in self._folder.glob("act-*.json") if (one := self._read(path)) is not None]

    def _read(self, path: Path) -> Activations | None:
        """None for what is gone, damaged, or over its time."""
        try:
            found = Activations.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("activations_unreadable", id=path.stem, error=f"{type(error).__name__}: {error}"[:200])
            return None
        if found.expires_at > self._now():
            return found
        self._remove(found.id)
        return None

    def _remove(self, id: str) -> None:
        """First what says that they are there."""
        try:
            for suffix in ("json", "safetensors", "partial"):
                self._path(id, suffix).unlink(missing_ok=True)
        except OSError as error:
            log.warning("activations_not_removed", id=id, error=str(error))

    def _path(self, id: str, suffix: str) -> Path:
        return self._folder / f"{id}.{suffix}"


def new_id() -> str:
    return f"act-{secrets.token_hex(12)}"


def owner() -> str:
    """The tenant to which belongs what is made now."""
    return maker()
