"""Libraries on SQLite for tests: copies of one that this process migrated once, because migrating takes ten times as
long."""

import functools
import tempfile
from pathlib import Path

from vectors.library.database import Database


def library_url(folder: Path) -> str:
    """Of `library.db` in the folder, which is made with the tables of a library where it is not there."""
    path = folder / "library.db"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_migrated())
    return f"sqlite:///{path}"


@functools.cache
def _migrated() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Database(f"sqlite:///{folder}/library.db").close()
        return Path(folder, "library.db").read_bytes()
