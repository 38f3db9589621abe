"""Folders with models in Hugging Face form, made once and kept: `CACHE/models/DIGEST/NAME`.

A folder is there or it is not: it is made beside its place and moved there whole. What a killed run has left is cleared
by the next one. One process at a time makes models; others wait for it and then find the folder.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from server.checkpoints.progress import Progress
from server.checkpoints.unavailable import ModelUnavailable

# Changes when the same source is made into something else; older folders are then made anew.
FORM = 1
MAKING = ".making-"
KEY_DIGITS = 16
# Called with the folder to fill and one for what is only needed meanwhile, both empty.
Make = Callable[[Path, Path], None]


class ModelCache:
    """The cache below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.downloads = root / "downloads"

    def place(self, digest: str, name: str) -> Path:
        """Where the model made from a source with this SHA-256 lies, made or not."""
        return self.root / "models" / f"{digest[:KEY_DIGITS]}-{FORM}" / name

    def folder(self, digest: str, name: str, make: Make, progress: Progress) -> Path:
        """The model's folder; `make` fills it if it is not there yet.

        Raises:
            ModelUnavailable: the cache cannot be written.
        """
        place = self.place(digest, name)
        if place.exists():
            return place
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            self.downloads.mkdir(parents=True, exist_ok=True)
            with self._alone(progress):
                if not place.exists():
                    self._make(place, make)
        except OSError as error:
            raise ModelUnavailable(f"{name} cannot be put into the cache {self.root}: {error.strerror or error}",
                                   param="cache_dir", fix="Set TRIMTAB_CACHE_DIR to a folder that can be written and "
                                                          "has room.") from error
        return place

    def _make(self, place: Path, make: Make) -> None:
        for left in [*self.root.glob(f"models/*/{MAKING}*"), *self.downloads.glob(".*")]:
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=MAKING, dir=place.parent, ignore_cleanup_errors=True) as name:
            folder, scratch = Path(name) / "model", Path(name) / "scratch"
            folder.mkdir()
            scratch.mkdir()
            make(folder, scratch)
            os.rename(folder, place)

    @contextmanager
    def _alone(self, progress: Progress) -> Iterator[None]:
        lock = FileLock(self.root / "models.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress("Waiting for another process that makes a model ready", 0, 0)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
