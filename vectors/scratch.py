"""Folders for numbers that do not fit into memory: gone with the work, or after a crash at the next `sweep`."""

import fcntl
import math
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from vectors.locks import held
from vectors.storage_errors import storage_error, storing

Number = TypeVar("Number", bound=np.generic)
PREFIX = "trimtab-scratch-"
LOCK = "lock"
# A folder without a held lock may be one that is being made this moment.
YOUNG_S = 600.0


class ScratchFolder:
    """A new folder under the system's temporary one. Its lock is held as long as the process lives, however it ends."""

    def __init__(self) -> None:
        """Raises StorageUnavailable."""
        with storing("there is no temporary folder"):
            self._folder = tempfile.TemporaryDirectory(prefix=PREFIX)
            self.path = Path(self._folder.name)
            self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def array(self, name: str, dtype: type[Number], shape: tuple[int, ...]) -> npt.NDArray[Number]:
        """Zeros in a file. Its space is taken here: a page that finds no room later would kill the process.

        Raises:
            StorageFull: there is not so much.
        """
        path = self.path / name
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise storage_error(error, f"there is no room for {size} bytes of working space") from error
        return np.memmap(path, dtype=dtype, mode="r+", shape=shape)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        self._folder.cleanup()
        os.close(self._lock)


def sweep(min_age_s: float = YOUNG_S) -> int:
    """Remove scratch folders that no living process holds; returns how many."""
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # Another user's, or gone meanwhile: neither is ours to remove.
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime >= min_age_s and not held(folder / LOCK):
                shutil.rmtree(folder)
                removed += 1
    return removed
