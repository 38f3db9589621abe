"""The file of a backup: a tar with the rows of each table, the numbers, and a list of what has to be in it.

The list comes last, so a file that was cut off has none. Nothing is ever unpacked: members are read by the names that
the list gives.
"""

import hashlib
import io
import json
import os
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from steering.language.errors import InvalidRequest
from vectors.library.blobs import digest_of
from vectors.storage_errors import CorruptBlob, storage_error

LIST = "backup.json"
FORM = 1


@dataclass(frozen=True)
class Contents:
    """
    Attributes:
        revision: of the schema that the rows are in.
        tables: SHA-256 of the rows of each table.
        blobs: digests of the numbers.
    """

    revision: str
    tables: Mapping[str, str]
    blobs: tuple[str, ...]
    form: int = FORM

    def to_json(self) -> str:
        return json.dumps({**vars(self), "tables": dict(self.tables)})


class Writing:
    """What has been put into a backup so far."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.blobs: dict[str, None] = {}

    def blob(self, digest: str, data: bytes) -> None:
        self._add(_blob(digest), data)
        self.blobs[digest] = None

    def finish(self, revision: str, tables: Mapping[str, str], blobs: tuple[str, ...]) -> None:
        """tables: JSON lines."""
        for name, rows in tables.items():
            self._add(_table(name), rows.encode())
        digests = {name: digest_of(rows.encode()) for name, rows in tables.items()}
        self._add(LIST, Contents(revision, digests, blobs).to_json().encode())

    def _add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o600
        self._tar.addfile(member, io.BytesIO(data))


@contextmanager
def written(path: Path) -> Iterator[Writing]:
    """A backup that is at `path`, readable by its owner alone, once the block has ended, and not before.

    Raises:
        StorageUnavailable, StorageFull.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                yield Writing(tar)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise storage_error(error, "the backup cannot be written") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


class Reading:
    """A backup that is whole, as far as its list says."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        try:
            told = json.loads(self._read(LIST))
            self.contents = Contents(**{**told, "blobs": tuple(told["blobs"])})
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest("the file is no backup of a library, or was cut off", param="file") from error
        if self.contents.form != FORM:
            raise InvalidRequest("a newer version wrote this backup", param="file", fix="Restore it with that version.")

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Raises InvalidRequest: it is no backup. StorageUnavailable."""
        try:
            with tarfile.open(path, mode="r:") as tar:
                yield cls(tar)
        except tarfile.TarError as error:
            raise InvalidRequest(f"the file is no backup of a library: {error}", param="file") from error
        except OSError as error:
            raise storage_error(error, "the backup cannot be read") from error

    def blob(self, digest: str) -> bytes:
        """Raises CorruptBlob."""
        return self._checked(_blob(digest), digest)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Raises CorruptBlob."""
        data = self._checked(_table(table), self.contents.tables[table])
        return [json.loads(line) for line in data.decode().splitlines()]

    def _checked(self, name: str, digest: str) -> bytes:
        try:
            data = self._read(name)
        except KeyError as error:
            raise CorruptBlob(f"{name} is missing in the backup") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise CorruptBlob(f"{name} in the backup does not match its digest")
        return data

    def _read(self, name: str) -> bytes:
        """Raises KeyError."""
        found = self._tar.extractfile(name)
        if found is None:
            raise KeyError(name)
        return found.read()


def _blob(digest: str) -> str:
    return f"blobs/{digest}.safetensors"


def _table(name: str) -> str:
    return f"tables/{name}.jsonl"
