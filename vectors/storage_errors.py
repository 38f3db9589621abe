"""The library cannot store or read: it is full, damaged or out of reach."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from steering.language.errors import InvalidRequest, TrimtabError


class LibraryFull(InvalidRequest):
    """What is to be stored is over the library's limit on bytes, names or versions."""

    code = "library_full"


class CorruptBlob(TrimtabError):
    """Stored numbers are missing or do not match their digest: the storage under the library is damaged."""

    code = "corrupt_blob"


class StorageUnavailable(TrimtabError):
    """A disk or store cannot be read or written: read-only, failing, out of reach, no right to it."""

    code = "storage_unavailable"


class StorageFull(StorageUnavailable):
    """There is no space left on a disk, or none that this process may use."""

    code = "storage_full"


# What the operating system says of disks, not of programs.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FAILING = frozenset({errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO})


def storage_error(error: OSError, what: str) -> StorageUnavailable:
    """The typed error of one that the operating system reports; `what` could not be done. No path is in it."""
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno in FULL:
        return StorageFull(f"{what}: {reason}", fix="Make room on the server's disk.")
    return StorageUnavailable(f"{what}: {reason}", fix="Look at the server's disk and its rights.")


@contextmanager
def storing(what: str) -> Iterator[None]:
    """Raise the typed error of what the operating system reports in the block, which does nothing but use a disk. What
    an engine or a client may raise does not belong inside, as a lost connection is an OSError too.

    Raises:
        StorageUnavailable, StorageFull: `what` says what could not be done.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(error, what) from error


class LibraryUnavailable(TrimtabError):
    """The database cannot be reached, is locked for too long, or was written by a newer version."""

    code = "library_unavailable"
