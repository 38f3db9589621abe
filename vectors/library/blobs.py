"""Content-addressed storage of numbers: safetensors bytes under their sha256, on disk, S3 or in memory (fsspec)."""

import base64
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from vectors.storage_errors import CorruptBlob, StorageUnavailable, storage_error

SUFFIX = ".safetensors"
# Directory of files still being written; never read.
PARTIAL = "partial"
# How long a store elsewhere is asked again when it fails.
PATIENCE_S = 20.0
# Of S3. A listing that is kept would say that a blob is there which another server has collected; tries are made here.
# What is larger is stored in parts, each with a checksum of the driver's.
S3_OPTIONS: dict[str, Any] = {"use_listings_cache": False, "config_kwargs": {
    "retries": {"total_max_attempts": 1}, "connect_timeout": 5, "read_timeout": 30}}
S3_WHOLE_BYTES = 64 * 2**20
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stored:
    """One file in the store. `digest` is None for what is half-written."""

    path: str
    digest: str | None
    age_s: float
    nbytes: int


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class BlobStore:
    """Blobs under a URL: a local path, `s3://bucket/prefix`, `memory://name`. All methods raise StorageUnavailable
    (StorageFull) where the disk or the store fails.

    A blob is there whole or not at all: on a local disk it is written beside its place, synced and renamed; object
    stores publish an object only once it is complete. A store elsewhere that fails is asked again for `patience_s`;
    S3 is told the SHA-256 of what it is to store, and refuses what arrives otherwise.
    """

    def __init__(self, url: str, *, patience_s: float = PATIENCE_S) -> None:
        s3 = url.startswith(("s3://", "s3a://"))
        try:
            fs, root = url_to_fs(url, **(S3_OPTIONS if s3 else {}))
        except (ImportError, ValueError) as error:
            raise StorageUnavailable(f"the store of blobs cannot be opened: {error}"[:300], fix="Install its driver, "
                                     "for S3 by pip install 'trimtab[s3]', or give another URL.") from error
        if s3:
            fs.retries = 1
        self._fs: Any = fs
        self._root: str = root.rstrip("/")
        self._s3, self._patience_s = s3, patience_s
        self._local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
        if self._local:
            with self._typed("the folder of blobs cannot be used"):
                os.makedirs(f"{self._root}/{PARTIAL}", exist_ok=True)

    def put(self, data: bytes) -> str:
        """Store durably; returns the digest. A blob that is there already counts as new, which keeps `gc` off it."""
        digest = digest_of(data)
        with self._typed("the numbers cannot be stored"):
            if not self._local:
                checked = {"ChecksumSHA256": base64.b64encode(bytes.fromhex(digest)).decode()} if (
                    self._s3 and len(data) <= S3_WHOLE_BYTES) else {}
                self._asked(lambda: self._fs.pipe_file(self._path(digest), data, **checked))
            else:
                self._put_local(self._path(digest), data, digest)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes, verified.

        Raises:
            CorruptBlob: missing, or not what the digest says.
        """
        try:
            with self._typed("the numbers cannot be read", may_lack=True):
                data = self._asked(lambda: self._intact(digest))
        except FileNotFoundError as error:
            raise CorruptBlob(f"the blob {digest} is missing", fix="Restore it from a backup.") from error
        if digest_of(data) != digest:
            raise CorruptBlob(f"the blob {digest} does not match its digest", fix="Restore it from a backup.")
        return data

    def exists(self, digest: str) -> bool:
        with self._typed("the store cannot be asked"):
            return bool(self._asked(lambda: self._fs.exists(self._path(digest))))

    def remove(self, stored: Stored) -> None:
        with suppress(FileNotFoundError), self._typed("a file cannot be removed", may_lack=True):
            self._asked(lambda: self._fs.rm_file(stored.path))

    def files(self) -> Iterator[Stored]:
        """All blobs and all that is half-written. What else lies there is not the library's."""
        with self._typed("the store cannot be listed"):
            self._fs.invalidate_cache()
            now = datetime.now(UTC).timestamp()
            found = sorted(self._asked(lambda: self._fs.find(self._root, detail=True)).items())
        for path, info in found:
            stem = path.rsplit("/", 1)[-1].removesuffix(SUFFIX)
            whole = self._path(stem) == path
            if whole or path.startswith(f"{self._root}/{PARTIAL}/"):
                yield Stored(path, stem if whole else None, now - _modified(info), int(info.get("size") or 0))

    def _intact(self, digest: str) -> bytes:
        """What is stored. Of a store elsewhere it is read twice where it does not match its digest, because it may have
        suffered on the way."""
        data: bytes = self._fs.cat_file(self._path(digest))
        if not self._local and digest_of(data) != digest:
            data = self._fs.cat_file(self._path(digest))
        return data

    def _asked(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which may be done again where a store elsewhere fails."""
        if self._local:
            return work()
        return Retrying(retry=retry_if_exception(_may_pass), wait=wait_random_exponential(0.1, max=2.0),
                        stop=stop_after_delay(self._patience_s), reraise=True)(work)

    @contextmanager
    def _typed(self, what: str, *, may_lack: bool = False) -> Iterator[None]:
        """Raise StorageUnavailable for whatever a disk or a store may fail with. may_lack: that a file is missing stays
        a FileNotFoundError."""
        try:
            yield
        except OSError as error:
            if may_lack and isinstance(error, FileNotFoundError):
                raise
            raise storage_error(error, what) from error
        except Exception as error:  # each driver of a store has exceptions of its own
            if self._local:
                raise
            raise StorageUnavailable(f"{what}: {type(error).__name__}", fix="Look at the store of blobs.") from error

    def _path(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}{SUFFIX}"

    def _put_local(self, path: str, data: bytes, digest: str) -> None:
        parent = os.path.dirname(path)
        os.makedirs(parent, exist_ok=True)
        if _intact(path, digest):
            os.utime(path)
        else:
            self._write(path, data)
        # The rename is durable once the directory is, and a new directory once its parent is.
        _sync_directory(parent)
        _sync_directory(self._root)

    def _write(self, path: str, data: bytes) -> None:
        partial = f"{self._root}/{PARTIAL}/{uuid.uuid4().hex}"
        os.makedirs(f"{self._root}/{PARTIAL}", exist_ok=True)
        try:
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise


def _may_pass(error: BaseException) -> bool:
    """Whether a store may do later what it did not now."""
    return isinstance(error, Exception) and not isinstance(error, FileNotFoundError | PermissionError)


def _intact(path: str, digest: str) -> bool:
    """Whether the blob is there and undamaged, so that storing it again heals a damaged one."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except FileNotFoundError:
        return False


def _sync_directory(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _modified(info: dict[str, Any]) -> float:
    """Time of the last write in seconds since 1970, as the file system at hand words it."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp() if value.tzinfo else value.replace(tzinfo=UTC).timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    raise CorruptBlob(f"the file system reports no time of writing for {info.get('name')}")
