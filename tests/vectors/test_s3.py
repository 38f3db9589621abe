"""Blobs on a server that speaks S3: what it refuses for a while is stored all the same, and what suffers is noticed."""

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest

from server.errors import status_of
from tests.s3 import S3
from tests.vectors.making import metadata, open_library, same_numbers, vector_payload
from vectors import CorruptBlob
from vectors.library.blobs import BlobStore, digest_of
from vectors.storage_errors import StorageUnavailable

BUCKET = "blobs"


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with S3().running() as found:
        yield found


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield server
    server.refuses.clear()
    server.damage = None
    for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=found["Key"])
    client.close()


@pytest.fixture
def store(s3: S3) -> Iterator[BlobStore]:
    yield BlobStore(f"s3://{BUCKET}/numbers", patience_s=60)
    fsspec.filesystem("s3").clear_instance_cache()


def test_stored_bytes_come_back_and_are_collected(store: BlobStore) -> None:
    digest = store.put(b"numbers")
    assert digest == digest_of(b"numbers") == store.put(b"numbers") and store.get(digest) == b"numbers"
    assert store.exists(digest) and not store.exists(digest_of(b"other"))
    found = list(store.files())
    assert [(one.digest, one.nbytes) for one in found] == [(digest, 7)] and found[0].age_s < 600
    for _ in range(2):
        store.remove(found[0])
    assert not store.exists(digest)
    with pytest.raises(CorruptBlob, match="missing"):
        store.get(digest)


def test_what_another_server_collected_is_not_said_to_be_there(store: BlobStore, s3: S3) -> None:
    digest = store.put(b"numbers")
    assert list(store.files()) and store.exists(digest)
    boto3.client("s3").delete_object(Bucket=BUCKET, Key=f"numbers/{digest[:2]}/{digest}.safetensors")
    assert not store.exists(digest)


def test_s3_is_told_the_digest_of_what_it_stores(store: BlobStore, s3: S3) -> None:
    store.put(b"numbers")
    assert base64.b64decode(s3.checksums[-1]) == hashlib.sha256(b"numbers").digest()


@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD", "DELETE"])
def test_a_503_is_tried_again(store: BlobStore, s3: S3, method: str) -> None:
    digest = store.put(b"numbers")
    use = {"PUT": lambda: store.put(b"other"), "GET": lambda: store.get(digest), "HEAD": lambda: store.exists(digest),
           "DELETE": lambda: store.remove(next(store.files()))}[method]
    s3.refuses[method] = 3
    use()
    assert s3.refuses[method] == 0


def test_who_fails_for_good_is_a_typed_error_that_names_no_place(s3: S3) -> None:
    impatient = BlobStore(f"s3://{BUCKET}/numbers", patience_s=0.2)
    s3.refuses["PUT"] = 10**6
    with pytest.raises(StorageUnavailable) as caught:
        impatient.put(b"numbers")
    assert status_of(caught.value) == 503 and s3.url not in str(caught.value) and BUCKET not in str(caught.value)


def test_what_suffers_on_the_way_is_read_again(store: BlobStore, s3: S3) -> None:
    digest = store.put(b"numbers")

    def once(body: bytes) -> bytes:
        s3.damage = None
        return b"humbers"

    s3.damage = once
    assert store.get(digest) == b"numbers"
    s3.damage = lambda body: b"humbers"
    with pytest.raises((CorruptBlob, StorageUnavailable)):
        BlobStore(f"s3://{BUCKET}/numbers", patience_s=0.2).get(digest)


def test_a_library_on_s3(s3: S3, tmp_path: Path) -> None:
    library = open_library(tmp_path, blob_url=f"s3://{BUCKET}/library")
    library.create(metadata(), vector_payload(1))
    library.create(metadata(), vector_payload(2))
    library.delete("cheerful@1")
    assert library.damaged() == [] and len(library.gc(min_age_s=-10).blobs) == 1
    assert same_numbers(library.source("cheerful").payload, vector_payload(2))
    library.close()


def test_a_store_whose_driver_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageUnavailable) as caught:
        BlobStore("nosuchstore://x/y")
    assert caught.value.fix is not None and "trimtab[s3]" in caught.value.fix
