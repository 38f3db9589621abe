"""Files of the API: requests that were uploaded and results of batches, for a bounded time and within a bound of
bytes."""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from openai.types import FileObject

from server.errors import FilesFull
from server.shelf import Shelf, write_durably
from vectors.library.audit.notes import maker
from vectors.storage_errors import storing

Purpose = Literal["batch", "batch_output"]


class StoredFiles(Shelf[FileObject]):
    """Methods block: call them in a thread. Several servers may share the folder."""

    def __init__(self, folder: Path, *, most_bytes: int, seconds: float, now: Callable[[], float] = time.time) -> None:
        super().__init__(folder, FileObject, ids=r"file-[0-9a-f]{24}(-output|-errors)?", content="content",
                         several="files", param="file_id", seconds=seconds, now=now)
        self._most_bytes = most_bytes

    def upload(self, name: str, content: bytes, seconds: float | None = None) -> FileObject:
        """Raises FilesFull."""
        if sum(file.bytes for file in self.all(of_all=True)) + len(content) > self._most_bytes:
            raise FilesFull(f"{len(content)} bytes more are over the limit of {self._most_bytes} on all files",
                            param="file", fix="Delete files, or raise files_bytes.")
        file_id = f"file-{secrets.token_hex(12)}"
        return self.keep(file_id, name, "batch", lambda path: write_durably(path, content), seconds)

    def keep(self, file_id: str, name: str, purpose: Purpose, write: Callable[[Path], None],
             seconds: float | None = None, *, tenant: str | None = None) -> FileObject:
        """Make a file, or make it anew. write: puts the content at a path. tenant: whose it is, by default of who asks.
        The quota is for uploads, so results are never lost to it."""
        partial = self.partial(file_id)
        try:
            with storing("the file cannot be stored"):
                self.folder.mkdir(parents=True, exist_ok=True)
                write(partial)
                size = partial.stat().st_size
            created, expires = self.expiry(seconds)
            file = FileObject(id=file_id, bytes=size, created_at=created, filename=name[:255], object="file",
                              purpose=purpose, status="processed", expires_at=expires)
            self.place(file, tenant or maker())
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        return file
