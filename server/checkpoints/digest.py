"""SHA-256 of files, piece by piece."""

import hashlib
from pathlib import Path
from typing import IO

from server.checkpoints.progress import Progress, silent

PIECE_BYTES = 1 << 20


def sha256_of(path: Path, what: str = "", progress: Progress = silent) -> str:
    """64 hex digits. Raises OSError."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            done += len(piece)
            progress(what, done, total)
    return digest.hexdigest()


def copy_hashed(source: IO[bytes], target: Path, what: str, total: int, progress: Progress) -> str:
    """Write `source` to `target`; the digest of what was written. Raises OSError."""
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as file:
        while piece := source.read(PIECE_BYTES):
            digest.update(piece)
            file.write(piece)
            done += len(piece)
            progress(what, done, total)
    return digest.hexdigest()
