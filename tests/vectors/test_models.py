"""Names belong to models: the same one may exist for several, and a library of before is taken apart."""

import json
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import text

from steering.language.errors import Conflict, NotFound
from steering.language.spec import Spec
from tests.vectors.making import metadata, open_library, vector_payload
from vectors.library import Filter, Library
from vectors.library.database import alembic_config

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
SPEC = Spec.model_validate({"interventions": [{"artifact": "cheerful"}]})


def stored(library: Library, fingerprint: str | None, seed: int = 1) -> str:
    return library.create(metadata(fingerprint=fingerprint), vector_payload(seed)).ref


def test_each_model_has_versions_aliases_and_presets_of_its_own(tmp_path: Path) -> None:
    library = open_library(tmp_path)
    library.serve(A)
    assert [stored(library, A), stored(library, A, 2), stored(library, B, 3)] == ["cheerful@1", "cheerful@2",
                                                                                  "cheerful@1"]
    library.set_alias("cheerful", "production", 1)
    assert library.presets.create("mood", SPEC).ref == "mood@1"
    library.serve(B)
    assert library.resolve("cheerful").metadata.fingerprint == B and library.resolve("cheerful").aliases == ()
    assert library.source("cheerful@1").fingerprint == B
    assert library.presets.list().items == []
    # Of another model, so nothing of this one: it may go, and the name is free for a preset of its own.
    library.presets.create("mood", SPEC, "of b")
    with pytest.raises(Conflict, match="mood@1"):
        library.delete("cheerful")
    library.presets.delete("mood")
    assert library.delete("cheerful") == ["cheerful@1"]
    library.serve(A)
    assert library.presets.resolve("mood").description == ""
    with pytest.raises(Conflict, match="production"):
        library.delete("cheerful")


def test_what_belongs_to_no_model_is_everybodys_and_what_is_another_models_is_found_last(tmp_path: Path) -> None:
    library = open_library(tmp_path)
    stored(library, None)
    library.serve(A)
    assert stored(library, A, 2) == "cheerful@2"
    other = library.create(metadata(name="calm", fingerprint=B), vector_payload(1))
    assert library.resolve("calm").ref == other.ref
    assert [one.metadata.name for one in library.list().items] == ["cheerful"]
    assert [one.metadata.name for one in library.list(Filter(everything=True)).items] == ["calm", "cheerful"]
    # Without a fingerprint of its own it belongs to the model that is served.
    library.create(metadata(name="own", fingerprint=None), vector_payload(1))
    library.serve(C)
    assert [one.metadata.name for one in library.list().items] == ["cheerful"]


@pytest.mark.parametrize("order", ["name", "-name", "created", "-created"])
def test_pages_hold_every_model_of_a_name_once(tmp_path: Path, order: str) -> None:
    library = open_library(tmp_path)
    for name in ("x", "y", "z"):
        for model in (A, B, C):
            library.create(metadata(name=name, fingerprint=model), vector_payload(1))
    found, cursor = [], None
    while True:
        page = library.list(order=order, limit=2, cursor=cursor)
        found += [(one.metadata.name, one.metadata.fingerprint) for one in page.items]
        cursor = page.cursor
        if cursor is None:
            break
    assert len(found) == len(set(found)) == 9
    assert found == sorted(found, reverse=order.startswith("-"))


def test_a_library_of_before_is_taken_apart_and_keeps_its_numbers(tmp_path: Path) -> None:
    """One name with versions of two models, as it was stored when names knew of none."""
    library = open_library(tmp_path)
    library.serve(A)
    for seed in (1, 2, 3):
        stored(library, A, seed)
    library.create(metadata(name="only-b", fingerprint=B), vector_payload(1))
    library.set_alias("cheerful", "production", 1)
    library.set_alias("cheerful", "trial", 2)
    library.presets.create("mood", Spec.model_validate({"interventions": [{"artifact": "only-b"}]}))
    with library._database.migrating() as connection:
        config = alembic_config(connection)
        command.downgrade(config, "0004")
        # Version 2 was made on another model.
        connection.execute(text("UPDATE artifact SET document = replace(document, :a, :b) WHERE version_id = 2"),
                           {"a": A, "b": B})
        command.upgrade(config, "head")
    library.close()
    library = open_library(tmp_path)
    library.serve(A)
    assert [(one.ref, one.aliases) for one in library.versions("cheerful")] == [
        ("cheerful@3", ()), ("cheerful@1", ("production",))]
    with pytest.raises(NotFound):
        library.resolve("cheerful@2")
    assert stored(library, A, 9) == "cheerful@4"
    assert library.presets.list().items == []
    library.serve(B)
    assert [(one.ref, one.aliases) for one in library.versions("cheerful")] == [("cheerful@2", ("trial",))]
    assert [one.metadata.name for one in library.list().items] == ["cheerful", "only-b"]
    assert [one.name for one in library.presets.list().items] == ["mood"]
    assert json.loads(library.resolve("cheerful").metadata.document())["fingerprint"] == B
