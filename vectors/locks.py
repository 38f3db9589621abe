"""Files whose lock tells whether the process that made them lives. The system releases the lock however it ends."""

import fcntl
import os
from pathlib import Path


def held(path: Path) -> bool:
    """Whether a living process holds the lock of a file. Raises OSError, but not where the file is gone."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
