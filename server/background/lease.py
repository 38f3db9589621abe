"""Which server process a piece of shared state belongs to, told by a lock that ends with the process."""

import fcntl
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from vectors.locks import held

_ID = re.compile(r"server-[0-9a-f]{16}")


class Lease:
    """Of one server process in a folder that several may use: a file of its own, locked as long as the process lives,
    however it ends."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError: the folder cannot be written."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            self.id = f"server-{secrets.token_hex(8)}"
            path = self._path(self.id)
            self._handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            # Another one may have taken it, not locked yet, for one that was left behind.
            with suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(self._handle).st_ino:
                    return
            os.close(self._handle)

    def release(self) -> None:
        with suppress(OSError):
            self._path(self.id).unlink(missing_ok=True)
        os.close(self._handle)

    def held(self, owner: str) -> bool:
        """Whether the process that has the lease `owner` lives. Locks that nobody holds are removed on the way."""
        if owner == self.id:
            return True
        if not _ID.fullmatch(owner):
            return False
        if held(self._path(owner)):
            return True
        with suppress(OSError):
            self._path(owner).unlink(missing_ok=True)
        return False

    def others(self) -> list[str]:
        """Leases of other processes that live."""
        found = [path.stem for path in self._folder.glob("server-*.lock") if path.stem != self.id]
        return [owner for owner in found if self.held(owner)]

    def _path(self, owner: str) -> Path:
        return self._folder / f"{owner}.lock"
