"""A backup is the library of one moment, whole, and makes the same library elsewhere, on either kind of database."""

import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command

from steering.language.errors import Conflict, InvalidRequest
from tests.vectors.making import execute, metadata, open_library, vector_payload
from tests.vectors.test_migrations import fill, told
from vectors import CorruptBlob, Library
from vectors.library.audit.log import Wanted
from vectors.library.backup import back_up, restore
from vectors.library.blobs import BlobStore
from vectors.library.database import alembic_config


def save(library: Library, path: Path) -> Path:
    back_up(library._database, library._blobs, path)
    return path


def put_back(path: Path, folder: Path) -> Library:
    folder.mkdir(exist_ok=True)
    library = open_library(folder)
    restore(library._database, library._blobs, path)
    return library


def test_the_same_library_comes_back(library: Library, tmp_path: Path) -> None:
    fill(library)
    wanted, keys, policies, audit = told(library), library.keys.all(), library.policies.all(), library.audit.head()
    file = save(library, tmp_path / "backup.tar")
    assert file.stat().st_mode & 0o077 == 0
    again = put_back(file, tmp_path / "again")
    assert told(again) == wanted and again.damaged() == []
    assert (again.keys.all(), again.policies.all()) == (keys, policies)
    # The chain goes on where it ended, and both copies are in it.
    assert again.audit.verify(audit).fault is None
    assert again.audit.list(Wanted(limit=1))[0].action == "library.restore"
    assert library.audit.list(Wanted(limit=1))[0].action == "library.backup"
    assert again.create(metadata(), vector_payload(9)).version == 3
    assert again.create(metadata("new"), vector_payload(9)).version == 1
    again.presets.delete("happy", force=True)


def test_nothing_is_put_into_a_library_that_holds_something(library: Library, tmp_path: Path) -> None:
    file = save(library, tmp_path / "backup.tar")
    other = put_back(file, tmp_path / "other")
    for change in (lambda: other.switches.set_kill_switch(True), lambda: other.create(metadata(), vector_payload(1))):
        change()
        with pytest.raises(Conflict, match="holds something"):
            restore(other._database, other._blobs, file)
    assert other.switches.kill_switch() is True


def test_it_is_taken_while_others_write_and_is_of_one_moment(library: Library, tmp_path: Path) -> None:
    """An alias moves with each version that is made; in every backup it points at the newest one that is in it."""
    library.create(metadata("v"), vector_payload(0))
    library.set_alias("v", "production", 1)
    done, failed = threading.Event(), []

    def write() -> None:
        try:
            for seed in range(1, 9):
                made = library.create(metadata("v"), vector_payload(seed))
                library.set_alias("v", "production", made.version)
                library.delete(f"v@{made.version - 1}")
                library.gc(min_age_s=-1)
        except Exception as error:  # raised in the test's own thread
            failed.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    files = []
    while not done.is_set() or not files:
        files.append(save(library, tmp_path / f"{len(files)}.tar"))
    writer.join()
    assert failed == []
    # The first, the last, and one between: each is a library to be made.
    for number, file in enumerate({files[0], files[len(files) // 2], files[-1]}):
        again = put_back(file, tmp_path / f"again{number}")
        versions = [one.version for one in again.versions("v")]
        assert again.resolve("v").version >= max(versions) - 1
        assert again.damaged() == [] and again.audit.verify().fault is None
        again.close()


def test_a_blob_that_was_collected_meanwhile_makes_it_begin_anew(library: Library, tmp_path: Path) -> None:
    for seed in range(3):
        library.create(metadata(f"v{seed}"), vector_payload(seed))

    class Slow(BlobStore):
        """Of the first blob that is read, another one goes."""

        gone = False

        def get(self, digest: str) -> bytes:
            data = super().get(digest)
            if not Slow.gone:
                Slow.gone = True
                names = [f"v{seed}" for seed in range(3) if library.resolve(f"v{seed}").digest != digest]
                library.delete(names[0])
                library.delete(names[1])
                library.gc(min_age_s=-1)
            return data

    back_up(library._database, Slow(str(tmp_path / "blobs")), tmp_path / "b.tar")
    again = put_back(tmp_path / "b.tar", tmp_path / "again")
    assert len(again.list().items) == 1 and again.damaged() == []


def test_numbers_that_are_missing_for_good_are_said_and_leave_no_file(library: Library, tmp_path: Path) -> None:
    library.create(metadata(), vector_payload(1))
    shutil.rmtree(tmp_path / "blobs")
    with pytest.raises(CorruptBlob):
        save(library, tmp_path / "b.tar")
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tar" or path.name.startswith(".")] == []


def cut(data: bytes) -> bytes:
    return data[:len(data) // 2]


def flip(data: bytes) -> bytes:
    at = data.index(b"cheerful")
    return data[:at] + b"chearful" + data[at + 8:]


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"no tar at all", lambda data: b""])
def test_a_damaged_backup_is_refused_and_nothing_is_stored(library: Library, tmp_path: Path,
                                                           damage: Callable[[bytes], bytes]) -> None:
    library.create(metadata(), vector_payload(1))
    file = save(library, tmp_path / "b.tar")
    file.write_bytes(damage(file.read_bytes()))
    (tmp_path / "again").mkdir()
    again = open_library(tmp_path / "again")
    with pytest.raises((CorruptBlob, InvalidRequest)):
        restore(again._database, again._blobs, file)
    assert again.list().items == []


def test_a_backup_of_an_older_schema_is_brought_to_the_present_one(library: Library, tmp_path: Path) -> None:
    library.create(metadata(tags=["low"]), vector_payload(1))
    wanted = library.versions("cheerful")
    with library._database.migrating() as connection:
        command.downgrade(alembic_config(connection), "0007")
    # A version of before would have written the same, which had these tables only.
    file = save(library, tmp_path / "b.tar")
    again = put_back(file, tmp_path / "again")
    assert again.versions("cheerful") == wanted and again.policies.all() == []


def test_a_backup_of_a_newer_schema_is_refused(library: Library, tmp_path: Path) -> None:
    execute(library, "UPDATE alembic_version SET version_num = '9999'")
    file = save(library, tmp_path / "b.tar")
    execute(library, "UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(InvalidRequest, match="newer"):
        put_back(file, tmp_path / "again")


def test_nothing_is_unpacked(library: Library, tmp_path: Path) -> None:
    """A member of another name, wherever it points, is nothing."""
    library.create(metadata(), vector_payload(1))
    file = save(library, tmp_path / "b.tar")
    with tarfile.open(file, "a") as tar:
        member = tarfile.TarInfo("../../outside")
        tar.addfile(member)
    assert put_back(file, tmp_path / "again").damaged() == []
    assert not (tmp_path / "outside").exists() and not (tmp_path.parent / "outside").exists()
