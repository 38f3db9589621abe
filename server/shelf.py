"""A folder of what belongs to tenants and goes after its time: of each a content, and beside it what is told of it.

They are named by ids that the server chose, and never by what a client calls them. Several servers may share the
folder.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from steering.language.errors import NotFound
from vectors.library.spaces import HOUSE, READER
from vectors.storage_errors import storing

log = structlog.get_logger("trimtab.shelf")
# Of what is told, whose it is.
TENANT = "tenant"
# What was not written to for so long belongs to somebody who is gone.
LEFT_BEHIND_S = 86400.0
Told = TypeVar("Told", bound=BaseModel)


class Shelf(Generic[Told]):
    """Methods block: call them in a thread.

    Args:
        kind: what is told of each. It has the fields id, created_at and expires_at, in seconds since 1970.
        ids: pattern of the ids. content: ending of the names of the contents.
        several: how errors call them. param: field of requests that names one.
        seconds: for how long they are kept at most.

    Raises of all methods: StorageUnavailable, StorageFull.
    """

    def __init__(self, folder: Path, kind: type[Told], *, ids: str, content: str, several: str, param: str,
                 seconds: float, now: Callable[[], float]) -> None:
        self.folder, self._kind, self._ids, self._content = folder, kind, re.compile(ids), content
        self._several, self._param, self._seconds, self._now = several, param, seconds, now

    def expiry(self, seconds: float | None) -> tuple[int, int]:
        """When something made now was made, and when it goes: after so many seconds, or as late as may be."""
        now = self._now()
        return int(now), int(now + min(seconds or self._seconds, self._seconds))

    def place(self, told: Told, tenant: str) -> None:
        """Have what lies at `partial(id)` as a content from now on."""
        name = self._id(told)
        partial = self.partial(name)
        with storing(f"the {self._several} cannot be stored"):
            os.replace(partial, self._path(name, self._content))
            write_durably(partial, json.dumps({**told.model_dump(mode="json"), TENANT: tenant}).encode(
                "utf-8", "surrogatepass"))
            # With this it is there.
            os.replace(partial, self._path(name, "json"))

    def partial(self, name: str) -> Path:
        """Where a content is made before it is placed."""
        return self._path(name, "partial")

    def find(self, name: str, param: str | None = None) -> Told:
        """Raises NotFound about the field `param`: there is none, or it is another tenant's."""
        found = self._read(self._path(name, "json")) if self._ids.fullmatch(name) else None
        if found is None or not READER.get().sees(found[1]):
            raise NotFound(f"there are no {self._several} {name[:64]!r}", param=param or self._param,
                           fix="They were deleted, or their time is over.")
        return found[0]

    def content(self, name: str, param: str | None = None) -> Path:
        """Raises NotFound about the field `param`."""
        self.find(name, param)
        return self._path(name, self._content)

    def all(self, *, of_all: bool = False) -> list[Told]:
        """Newest first: those of the tenant, or of all. Those whose time is over are removed on the way."""
        with storing(f"{self._several} cannot be listed"):
            read = [one for path in self.folder.glob("*.json") if (one := self._read(path)) is not None]
        found: list[Any] = [told for told, tenant in read if of_all or READER.get().sees(tenant)]
        return sorted(found, key=lambda told: (told.created_at, self._id(told)), reverse=True)

    def delete(self, name: str) -> Told:
        """Raises NotFound."""
        found = self.find(name)
        with storing(f"the {self._several} cannot be deleted"):
            self._remove(name)
        return found

    def discard(self, name: str) -> None:
        """Remove whatever there is of it, as far as the disk lets."""
        try:
            self._remove(name)
        except OSError as error:
            log.warning("not_removed", id=name, error=str(error))

    def sweep(self) -> None:
        """Remove those whose time is over, and what killed servers left half written."""
        self.all(of_all=True)
        for path in self._parts():
            with suppress(OSError):
                if not path.with_suffix(".json").exists() and self._now() - path.stat().st_mtime > LEFT_BEHIND_S:
                    path.unlink()

    def held(self) -> int:
        """Bytes that whole and half-written contents take."""
        self.all(of_all=True)
        held = 0
        for path in self._parts():
            with suppress(FileNotFoundError):
                held += path.stat().st_size
        return held

    def _parts(self) -> Iterator[Path]:
        for suffix in (self._content, "partial"):
            yield from self.folder.glob(f"*.{suffix}")

    def _read(self, path: Path) -> tuple[Told, str] | None:
        """What is told and whose it is; None for what is gone, damaged, or over its time."""
        try:
            given = json.loads(path.read_bytes())
            tenant = given.get(TENANT, HOUSE)
            if TENANT not in self._kind.model_fields:
                given.pop(TENANT, None)
            told: Any = self._kind.model_validate(given)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ValidationError) as error:
            log.warning("unreadable", file=path.name, error=f"{type(error).__name__}: {error}"[:200])
            return None
        if told.expires_at > self._now():
            return told, tenant
        self.discard(self._id(told))
        return None

    def _remove(self, name: str) -> None:
        """First what says that it is there."""
        for suffix in ("json", self._content, "partial"):
            self._path(name, suffix).unlink(missing_ok=True)

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}.{suffix}"

    @staticmethod
    def _id(told: Any) -> str:
        return str(told.id)


def write_durably(path: Path, content: bytes) -> None:
    """Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
