"""Files of the API: requests that were uploaded and results of batches, for a bounded time and within a bound of bytes.

A file is two files of a folder, its content and what is told of it. They are named by an id that the server chose, and
never by what a client calls them.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import structlog
from openai.types import FileObject
from pydantic import ValidationError

from server.errors import FilesFull
from steering.language.errors import NotFound
from vectors.library.audit.notes import maker
from vectors.library.spaces import HOUSE, READER
from vectors.storage_errors import storage_error

log = structlog.get_logger("trimtab.files")
_ID = re.compile(r"file-[0-9a-f]{24}(-output|-errors)?")
Purpose = Literal["batch", "batch_output"]
# What is told of a file beside what the API has.
TENANT = "tenant"


class StoredFiles:
    """Methods block: call them in a thread. Several servers may share the folder.

    Raises of all methods: StorageUnavailable, StorageFull.
    """

    def __init__(self, folder: Path, *, most_bytes: int, seconds: float, now: Callable[[], float] = time.time) -> None:
        self._folder, self._most_bytes, self._seconds, self._now = folder, most_bytes, seconds, now

    def upload(self, name: str, content: bytes, seconds: float | None = None) -> FileObject:
        """Raises FilesFull."""
        held = sum(file.bytes for file, _ in self._all())
        if held + len(content) > self._most_bytes:
            raise FilesFull(f"{len(content)} bytes more are over the limit of {self._most_bytes} on all files",
                            param="file", fix="Delete files, or raise files_bytes.")
        file_id = f"file-{secrets.token_hex(12)}"
        return self.keep(file_id, name, "batch", lambda path: _write(path, content), seconds)

    def keep(self, file_id: str, name: str, purpose: Purpose, write: Callable[[Path], None],
             seconds: float | None = None, *, tenant: str | None = None) -> FileObject:
        """Make a file, or make it anew. write: puts the content at a path. tenant: whose it is, by default of who asks.
        The quota is for uploads, so results are never lost to it."""
        now = self._now()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = self._path(file_id, "partial")
            write(partial)
            file = FileObject(id=file_id, bytes=partial.stat().st_size, created_at=int(now), filename=name[:255],
                              object="file", purpose=purpose, status="processed",
                              expires_at=int(now + min(seconds or self._seconds, self._seconds)))
            os.replace(partial, self._path(file_id, "content"))
            told = {**file.model_dump(mode="json"), TENANT: tenant or maker()}
            _write(partial, json.dumps(told).encode("utf-8", "surrogatepass"))
            # With this it is there.
            os.replace(partial, self._path(file_id, "json"))
        except OSError as error:
            with suppress(OSError):
                self._path(file_id, "partial").unlink(missing_ok=True)
            raise storage_error(error, "the file cannot be stored") from error
        return file

    def find(self, file_id: str, param: str = "file_id") -> FileObject:
        """Raises NotFound about the field `param`: there is none, or it is another tenant's."""
        found = self._read(self._path(file_id, "json")) if _ID.fullmatch(file_id) else None
        if found is None or not READER.get().sees(found[1]):
            raise NotFound(f"there is no file {file_id[:64]!r}", param=param,
                           fix="It was deleted, or its time is over.")
        return found[0]

    def content(self, file_id: str, param: str = "file_id") -> Path:
        """Raises NotFound about the field `param`."""
        self.find(file_id, param)
        return self._path(file_id, "content")

    def all(self) -> list[FileObject]:
        """Those of the tenant, newest first. Those whose time is over are removed on the way."""
        found = [file for file, tenant in self._all() if READER.get().sees(tenant)]
        return sorted(found, key=lambda file: (file.created_at, file.id), reverse=True)

    def delete(self, file_id: str) -> None:
        """Raises NotFound."""
        self.find(file_id)
        try:
            self._remove(file_id)
        except OSError as error:
            raise storage_error(error, "the file cannot be deleted") from error

    def _all(self) -> list[tuple[FileObject, str]]:
        try:
            return [file for path in self._folder.glob("file-*.json") if (file := self._read(path)) is not None]
        except OSError as error:
            raise storage_error(error, "files cannot be listed") from error

    def _read(self, path: Path) -> tuple[FileObject, str] | None:
        """A file and whose it is; None for one that is gone, damaged, or over its time."""
        try:
            told = json.loads(path.read_bytes())
            tenant = told.pop(TENANT, HOUSE)
            file = FileObject.model_validate(told)
            if file.expires_at is not None and file.expires_at > self._now():
                return file, tenant
            self._remove(file.id)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, ValidationError) as error:
            log.warning("file_unreadable", file=path.stem, error=f"{type(error).__name__}: {error}"[:200])
        return None

    def _remove(self, file_id: str) -> None:
        for suffix in ("json", "content"):
            self._path(file_id, suffix).unlink(missing_ok=True)

    def _path(self, file_id: str, suffix: str) -> Path:
        return self._folder / f"{file_id}.{suffix}"


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
