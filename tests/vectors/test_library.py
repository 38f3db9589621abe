from pathlib import Path

import pytest
import torch

from server.errors import status_of
from steering.artifacts.payload import KINDS
from steering.language.errors import Conflict, InvalidRequest, NotFound, PayloadTooLarge
from steering.language.spec import Spec
from tests.vectors.making import every_kind, metadata, open_library, same_numbers, vector_payload
from vectors import Library, Limits, Metadata, Patch
from vectors.library.sources import SOURCE_BYTES


def spec(*artifacts: str) -> Spec:
    return Spec.model_validate({"interventions": [{"artifact": name} for name in artifacts]})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_it_went_in(library: Library, tmp_path: Path, kind: str) -> None:
    meta, payload = every_kind()[kind]
    created = library.create(meta, payload)
    library.close()
    again = open_library(tmp_path)
    read = again.resolve(meta.name)
    assert read == created
    assert same_numbers(again.payload(read), payload)
    source = again.source(meta.name)
    assert (source.ref, source.op, source.site) == (f"{meta.name}@1", meta.op, meta.site)
    assert same_numbers(source.payload, payload)


def test_source_carries_what_the_maker_recorded(library: Library) -> None:
    library.create(metadata(layers=[3], strength={"value": 2, "unit": "rel"}, options={"preserve_norm": True},
                            model_id="m", fingerprint="f", residual_norm={3: 9.5}, sigma={3: 0.25}), vector_payload(1))
    source = library.source("cheerful@1")
    assert (source.layers, source.strength.value, source.strength.unit) == ([3], 2, "rel")
    assert (source.model_id, source.fingerprint, source.options) == ("m", "f", {"preserve_norm": True})
    assert (source.residual_norm, source.sigma) == ({3: 9.5}, {3: 0.25})


def test_versions_count_up_and_equal_content_is_stored_once(library: Library) -> None:
    first = library.create(metadata(), vector_payload(1))
    second = library.create(metadata(), vector_payload(2))
    assert (first.version, second.version) == (1, 2)
    assert library.create(metadata(), vector_payload(1)).version == 1
    assert library.create(metadata(description="other words"), vector_payload(1)).version == 3
    assert library.create(metadata("grumpy"), vector_payload(1)).ref == "grumpy@1"
    assert library.resolve("grumpy").digest == first.digest
    assert [a.version for a in library.versions("cheerful")] == [3, 2, 1]


def test_what_a_reference_means(library: Library) -> None:
    for seed in (1, 2, 3):
        library.create(metadata(), vector_payload(seed))
    assert library.resolve("cheerful").version == 3
    library.set_alias("cheerful", "production", 1)
    library.set_alias("cheerful", "canary", 2)
    meaning = {ref: library.resolve(ref).version for ref in (
        "cheerful", "cheerful@production", "cheerful@canary", "cheerful@latest", "cheerful@3", "cheerful@003")}
    assert meaning == {"cheerful": 1, "cheerful@production": 1, "cheerful@canary": 2, "cheerful@latest": 3,
                       "cheerful@3": 3, "cheerful@003": 3}
    library.create(metadata(), vector_payload(4))
    assert library.resolve("cheerful").version == 1
    library.remove_alias("cheerful", "production")
    assert library.resolve("cheerful").version == 4


@pytest.mark.parametrize("ref", ["nobody", "cheerful@9", "cheerful@0", "cheerful@999999999", "cheerful@nowhere"])
def test_unknown_references(library: Library, ref: str) -> None:
    library.create(metadata(), vector_payload(1))
    for use in (library.resolve, library.source, library.delete, lambda r: library.patch(r, Patch())):
        with pytest.raises(NotFound) as caught:
            use(ref)
        assert caught.value.param == "artifact"


@pytest.mark.parametrize("ref", ["", "@", "cheerful@", "../x", "a/b/c", "a/", "cheerful@1@2", "cheerful@-1", "CHEERFUL",
                                 "a b", "cheerful\n", "cheerful@1\n", "\ud800", "a" * 70, "cheerful@9999999999",
                                 "x\x00"])
def test_malformed_references(library: Library, ref: str) -> None:
    library.create(metadata(), vector_payload(1))
    for use in (library.resolve, library.source, library.delete, lambda r: library.patch(r, Patch())):
        with pytest.raises(InvalidRequest) as caught:
            use(ref)
        assert status_of(caught.value) == 400


def test_aliases_move_in_one_step(library: Library) -> None:
    for seed in (1, 2):
        library.create(metadata(), vector_payload(seed))
    assert library.set_alias("cheerful", "production", 1).aliases == ("production",)
    moved = library.set_alias("cheerful", "production", 2)
    assert (moved.version, moved.aliases) == (2, ("production",))
    assert library.resolve("cheerful@1").aliases == ()
    for number in (0, -1, 3, 10**30):
        with pytest.raises(NotFound):
            library.set_alias("cheerful", "production", number)
    assert library.resolve("cheerful@production").version == 2
    for alias in ("latest", "1", "Upper", "", "a" * 33, "x/y"):
        with pytest.raises(InvalidRequest):
            library.set_alias("cheerful", alias, 1)
    with pytest.raises(NotFound):
        library.remove_alias("cheerful", "canary")


def test_a_patch_changes_words_and_never_numbers(library: Library) -> None:
    library.create(metadata(tags=["old", "kept"], description="before", card={"auc": 0.5}), vector_payload(1))
    before = library.resolve("cheerful@1")
    source = library.source("cheerful@1")
    after = library.patch("cheerful@1", Patch(description="after", tags=("kept", "new")))
    assert (after.metadata.description, after.metadata.tags) == ("after", ("kept", "new"))
    assert after.metadata.card == {"auc": 0.5}
    assert library.patch("cheerful@1", Patch(card=None)).metadata.card is None
    words = {"description", "tags", "card"}
    assert after.metadata.model_dump(exclude=words) == before.metadata.model_dump(exclude=words)
    assert (after.digest, after.created_at, after.version) == (before.digest, before.created_at, 1)
    assert same_numbers(library.source("cheerful@1").payload, source.payload)
    # The upload that made it is still the same upload.
    assert library.create(before.metadata, vector_payload(1)).version == 1


def test_a_patch_keeps_to_the_limits(tmp_path: Path) -> None:
    library = open_library(tmp_path, limits=Limits(document_bytes=800))
    library.create(metadata(), vector_payload(1))
    with pytest.raises(PayloadTooLarge):
        library.patch("cheerful", Patch(card={"report": "x" * 800}))
    assert library.resolve("cheerful").metadata.card is None


def test_deleting_one_version_and_never_using_its_number_again(library: Library) -> None:
    for seed in (1, 2, 3):
        library.create(metadata(), vector_payload(seed))
    assert library.delete("cheerful@3") == ["cheerful@3"]
    assert library.resolve("cheerful").version == 2
    assert library.create(metadata(), vector_payload(3)).version == 4
    assert library.delete("cheerful") == ["cheerful@4", "cheerful@2", "cheerful@1"]
    with pytest.raises(NotFound):
        library.versions("cheerful")
    assert library.list().items == []
    assert library.create(metadata(), vector_payload(1)).version == 5


def test_a_deleted_version_is_gone_from_the_cache_too(library: Library) -> None:
    library.create(metadata(), vector_payload(1))
    library.source("cheerful@1")
    library.delete("cheerful@1")
    with pytest.raises(NotFound):
        library.source("cheerful@1")


@pytest.mark.parametrize("doomed", ["cheerful@1", "cheerful@production", "cheerful"])
def test_an_alias_protects_what_it_points_at(library: Library, doomed: str) -> None:
    for seed in (1, 2):
        library.create(metadata(), vector_payload(seed))
    library.set_alias("cheerful", "production", 1)
    with pytest.raises(Conflict, match="production"):
        library.delete(doomed)
    assert len(library.versions("cheerful")) == 2
    library.delete(doomed, force=True)
    with pytest.raises(NotFound):
        library.resolve("cheerful@production")


def test_presets_and_the_default_spec_protect_what_they_use(library: Library) -> None:
    for seed in (1, 2, 3):
        library.create(metadata(), vector_payload(seed))
    library.presets.create("happy", spec("cheerful@1"))
    library.switches.set_default_spec(spec("cheerful@2"))
    with pytest.raises(Conflict, match="happy@1"):
        library.delete("cheerful@1")
    with pytest.raises(Conflict, match="default spec"):
        library.delete("cheerful@2")
    assert library.delete("cheerful@3") == ["cheerful@3"]
    library.presets.delete("happy")
    library.delete("cheerful@1")
    library.switches.set_default_spec(spec("cheerful"))
    with pytest.raises(Conflict, match="default spec"):
        library.delete("cheerful@2")
    library.switches.clear_default_spec()
    assert library.delete("cheerful@2") == ["cheerful@2"]


def test_a_failed_creation_changes_nothing(library: Library) -> None:
    with pytest.raises(InvalidRequest):
        library.create(metadata(d_model=3), vector_payload(1))
    assert library.list().items == []
    assert library.create(metadata(), vector_payload(1)).version == 1


def test_handing_out_a_version_does_not_hand_out_the_library(library: Library) -> None:
    payload = vector_payload(1)
    library.create(metadata(provenance={"report": [1]}), payload)
    payload.layers[1]["vector"].zero_()
    read = library.resolve("cheerful@1")
    report = read.metadata.provenance["report"]
    assert isinstance(report, list)
    report.append(2)
    assert library.resolve("cheerful@1").metadata.provenance == {"report": [1]}
    assert same_numbers(library.payload(read), vector_payload(1))


def test_the_cache_is_bounded_in_bytes(tmp_path: Path) -> None:
    one = vector_payload(0).nbytes + SOURCE_BYTES
    library = open_library(tmp_path, cache_bytes=3 * one)
    for seed in range(5):
        library.create(metadata(f"v{seed}"), vector_payload(seed))
    library.create(metadata("large"), vector_payload(9, width=4096))
    first = library.source("v0")
    assert library.source("v0") is first
    for seed in range(1, 5):
        library.source(f"v{seed}")
    assert library.source("v0") is not first
    assert same_numbers(library.source("large").payload, vector_payload(9, width=4096))
    assert library.source("large") is not library.source("large")


def test_numbers_are_exact_to_the_bit(library: Library) -> None:
    odd = torch.tensor([torch.finfo(torch.float32).tiny, -0.0, 1e-45, 3.4e38, 1 / 3])
    payload = vector_payload(0, layers=(0,), width=5)
    payload.layers[0]["vector"].copy_(odd)  # type: ignore[index]
    library.create(metadata(), payload)
    read = library.payload(library.resolve("cheerful")).layers[0]["vector"]
    assert read.view(torch.int32).tolist() == odd.view(torch.int32).tolist()


def test_metadata_of_all_fields_survives(library: Library) -> None:
    full = metadata(layers={"start": 0, "stop": -1, "step": 2}, tags=["z", "a"], card={"auc": 0.25, "none": None},
                    description="Ünïcödé ✓\n", d_model=8, residual_norm={1: 0.1}, sigma={3: 1e-9},
                    provenance={"method": "difference of means", "deep": [[{"a": [1.5, None, True]}]]})
    assert library.create(full, vector_payload(1)).metadata == full
    assert isinstance(library.resolve("cheerful").metadata, Metadata)
    assert library.resolve("cheerful").metadata == full
