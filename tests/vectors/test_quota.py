"""The library takes no more than it may, keeps what it has, and takes again what was made room for."""

from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import inspect

from steering.language.spec import Spec
from tests.vectors.making import metadata, open_library, vector_payload
from vectors import Library, Limits, Patch
from vectors.library.database import alembic_config
from vectors.library.quota import Usage
from vectors.storage_errors import LibraryFull

SPEC = Spec.model_validate({"interventions": [{"artifact": "cheerful"}]})


def limited(folder: Path, **limits: int) -> Library:
    return open_library(folder, limits=Limits(**limits))


def blobs(folder: Path) -> list[Path]:
    return [path for path in (folder / "blobs").rglob("*") if path.is_file()]


def test_usage_counts_names_versions_and_bytes_once(library: Library) -> None:
    assert library.usage() == Usage(0, 0, 0)
    first = library.create(metadata(), vector_payload(1))
    document = len(first.metadata.document())
    assert library.usage() == Usage(1, 1, first.nbytes + document)
    library.create(metadata(), vector_payload(1))
    library.create(metadata("copy"), vector_payload(1))
    library.presets.create("p", SPEC)
    assert library.usage().names == 3 and library.usage().versions == 3
    assert first.nbytes < library.usage().nbytes < first.nbytes + 3 * document
    for name in ("cheerful", "copy"):
        library.delete(name, force=True)
    library.presets.delete("p")
    assert library.usage() == Usage(0, 0, 0)


def test_names_of_artifacts_and_presets_together(tmp_path: Path) -> None:
    library = limited(tmp_path, library_names=2)
    library.create(metadata(), vector_payload(1))
    library.presets.create("p", SPEC)
    for store in (lambda: library.create(metadata("other"), vector_payload(1)),
                  lambda: library.presets.create("q", SPEC)):
        with pytest.raises(LibraryFull, match="2 names.*library_names") as caught:
            store()
        assert caught.value.code == "library_full"
    # More versions of known names, and the same again, are no new names.
    library.create(metadata(), vector_payload(2))
    library.presets.create("p", SPEC, "again")
    library.presets.delete("p")
    library.create(metadata("other"), vector_payload(1))


def test_versions(tmp_path: Path) -> None:
    library = limited(tmp_path, library_versions=2)
    library.create(metadata(), vector_payload(1))
    library.presets.create("p", SPEC)
    with pytest.raises(LibraryFull, match="versions"):
        library.create(metadata(), vector_payload(2))
    assert library.create(metadata(), vector_payload(1)).version == 1


def test_bytes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    one = len(metadata().document()) + limited(tmp_path / "probe").create(metadata(), vector_payload(1)).nbytes
    library = limited(tmp_path, library_bytes=one + 50)
    library.create(metadata(), vector_payload(1))
    before = blobs(tmp_path)
    with pytest.raises(LibraryFull, match="bytes"):
        library.create(metadata("other"), vector_payload(2))
    with pytest.raises(LibraryFull, match="bytes"):
        library.patch("cheerful", Patch(description="x" * 100))
    assert blobs(tmp_path) == before and library.resolve("cheerful").metadata.description == ""
    assert library.patch("cheerful", Patch(description="short")).metadata.description == "short"
    library.delete("cheerful")
    library.create(metadata("other"), vector_payload(2))


def test_a_library_over_its_limit_can_be_used_and_shrunk(tmp_path: Path) -> None:
    limited(tmp_path).create(metadata(description="long" * 50), vector_payload(1))
    tight = limited(tmp_path, library_bytes=1, library_names=1, library_versions=1)
    assert tight.source("cheerful").ref == "cheerful@1"
    tight.patch("cheerful", Patch(description="shorter"))
    tight.set_alias("cheerful", "live", 1)
    assert tight.delete("cheerful", force=True) == ["cheerful@1"]


def test_documents_of_an_older_library_are_counted(tmp_path: Path) -> None:
    library = open_library(tmp_path)
    artifact = library.create(metadata(), vector_payload(1))
    library.presets.create("p", SPEC)
    before = library.usage()
    with library._database.migrating() as connection:
        command.downgrade(alembic_config(connection), "0001")
        assert "nbytes" not in {column["name"] for column in inspect(connection).get_columns("version")}
    again = open_library(tmp_path)
    assert again.usage() == before and before.nbytes > artifact.nbytes
    assert again.source("cheerful").digest == artifact.digest and again.presets.resolve("p").spec == SPEC
