import os
from pathlib import Path

import fsspec
import pytest

from server.errors import status_of
from tests.vectors.making import metadata, open_library, same_numbers, vector_payload
from vectors import CorruptBlob, Library
from vectors.library.blobs import BlobStore, digest_of


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
    return BlobStore(str(tmp_path / "blobs") if request.param == "disk" else "memory://blobs")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "blobs").rglob("*") if path.is_file())


def test_stored_bytes_come_back_under_their_digest(store: BlobStore) -> None:
    digest = store.put(b"numbers")
    assert digest == digest_of(b"numbers") == store.put(b"numbers")
    assert store.get(digest) == b"numbers"
    assert store.exists(digest) and not store.exists(digest_of(b"other"))
    assert [stored.digest for stored in store.files()] == [digest]
    for stored in store.files():
        store.remove(stored)
        store.remove(stored)
    assert list(store.files()) == []
    with pytest.raises(CorruptBlob):
        store.get(digest)


def test_storing_again_makes_a_blob_young(tmp_path: Path) -> None:
    store = BlobStore(str(tmp_path / "blobs"))
    store.put(b"numbers")
    os.utime(files(tmp_path)[0], (0, 0))
    assert next(store.files()).age_s > 1e9
    store.put(b"numbers")
    assert next(store.files()).age_s < 1000


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"", lambda data: data[:100],
    lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: data[:-1] + bytes([data[-1] ^ 0x80]),
])
def test_damage_is_noticed_and_uploading_again_heals_it(library: Library, tmp_path: Path, damage: object) -> None:
    library.create(metadata(), vector_payload(1))
    path = files(tmp_path)[0]
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CorruptBlob) as caught:
        library.source("cheerful")
    assert status_of(caught.value) == 500
    assert str(tmp_path) not in str(caught.value)
    assert library.damaged() == ["cheerful@1"]
    assert library.create(metadata(), vector_payload(1)).version == 1
    assert library.damaged() == []
    assert same_numbers(library.source("cheerful").payload, vector_payload(1))


def test_a_missing_blob_is_noticed(library: Library, tmp_path: Path) -> None:
    library.create(metadata(), vector_payload(1))
    files(tmp_path)[0].unlink()
    with pytest.raises(CorruptBlob):
        library.source("cheerful")
    assert library.damaged() == ["cheerful@1"]


def test_gc_takes_orphans_only_and_only_old_ones(library: Library, tmp_path: Path) -> None:
    kept = library.create(metadata(), vector_payload(1))
    library.create(metadata("same-numbers"), vector_payload(1))
    doomed = library.create(metadata("doomed"), vector_payload(2))
    library.delete("doomed")
    library.delete("same-numbers")
    (tmp_path / "blobs" / "partial" / "half").write_bytes(b"half written")
    stray = tmp_path / "blobs" / "stray.txt"
    stray.write_bytes(b"not ours, but here")
    assert library.gc(min_age_s=3600) == library.gc(min_age_s=3600)
    assert len(files(tmp_path)) == 4
    collected = library.gc(min_age_s=0)
    assert (collected.blobs, collected.partial, collected.nbytes) == ([doomed.digest], 1, doomed.nbytes + 12)
    assert [path.stem for path in files(tmp_path)] == sorted([kept.digest, "stray"])
    assert library.damaged() == []


def test_a_writer_whose_blob_is_collected_under_it_stores_it_again(library: Library, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    put = BlobStore.put
    collected = []

    def put_then_collect(store: BlobStore, data: bytes) -> str:
        digest = put(store, data)
        if not collected:
            collected.extend(library.gc(min_age_s=-1).blobs)
        return digest

    monkeypatch.setattr(BlobStore, "put", put_then_collect)
    created = library.create(metadata(), vector_payload(1))
    assert collected == [created.digest]
    assert library.damaged() == []


def test_a_library_whose_blobs_live_elsewhere(tmp_path: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    library = open_library(tmp_path, blob_url="memory://elsewhere/blobs")
    library.create(metadata(), vector_payload(1))
    library.create(metadata(), vector_payload(2))
    library.delete("cheerful@1")
    assert len(library.gc(min_age_s=-1).blobs) == 1
    assert same_numbers(library.source("cheerful").payload, vector_payload(2))
    assert not (tmp_path / "blobs").exists()


def test_equal_numbers_share_a_blob(library: Library, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        library.create(metadata(name), vector_payload(1))
    assert len(files(tmp_path)) == 1
    library.delete("a")
    library.delete("b")
    assert library.gc(min_age_s=-1).blobs == []
    assert library.damaged() == []
    assert open_library(tmp_path).resolve("c").digest == files(tmp_path)[0].stem
