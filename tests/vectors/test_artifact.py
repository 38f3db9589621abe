from typing import Any

import pytest
import torch

from server.errors import status_of
from steering.artifacts.payload import KINDS, READ_ONLY, Payload
from steering.language.errors import PayloadTooLarge
from steering.ops import get_operation
from tests.vectors.making import every_kind, metadata, vector_payload
from vectors import InvalidMetadata, Limits, Metadata
from vectors.artifact import ops_of_kind
from vectors.checks import check


@pytest.mark.parametrize("fields", [
    {"name": "Cheerful"}, {"name": ""}, {"name": "a" * 65}, {"name": "../etc/passwd"}, {"name": "a/b/c"},
    {"name": "/a"}, {"name": "a@1"}, {"name": "a\n"}, {"name": "ä"}, {"name": None},
    {"kind": "sae"}, {"op": "explode"}, {"site": "nowhere"}, {"op": "rotate"}, {"op": "mask"}, {"site": "router"},
    {"strength": {"value": float("nan")}}, {"strength": {"value": 1, "unit": "dB"}},
    {"strength": {"value": 1, "unit": "rel"}, "op": "ablate"},
    {"layers": []}, {"layers": "some"}, {"layers": {"start": 0}},
    {"options": {"nonsense": 1}}, {"options": {"norm_match": "perhaps"}},
    {"tags": ["a", "a"]}, {"tags": ["Not A Tag"]}, {"tags": [f"t{i}" for i in range(33)]},
    {"description": "bell \x07"}, {"description": "half \ud800"}, {"description": "x" * 9000},
    {"provenance": {"x": float("inf")}}, {"provenance": {"x": object()}}, {"provenance": []}, {"card": "good"},
    {"residual_norm": {"-1": 2.0}}, {"residual_norm": {"1": 0.0}}, {"sigma": {"1": float("nan")}},
    {"sigma": {"one": 1.0}}, {"d_model": 0}, {"model_id": "m" * 300}, {"unknown_field": 1},
])
def test_wrong_metadata_is_refused_by_name(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidMetadata) as caught:
        metadata(**{"name": "fine", **fields})
    assert status_of(caught.value) == 400
    assert caught.value.param is not None and caught.value.param.startswith("metadata")
    first = next(iter(fields))
    # Rules that tie fields together stand under the metadata as a whole, all others name the field.
    assert caught.value.param == "metadata" or first in caught.value.param


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_goes_with_the_ops_that_take_it(kind: str) -> None:
    meta, payload = every_kind()[kind]
    assert check(meta, payload, Limits()).kind == kind
    assert (not ops_of_kind(meta.kind)) == (kind in READ_ONLY) == (meta.op is None)
    for op in ops_of_kind(meta.kind):
        assert kind in get_operation(op).kinds


@pytest.mark.parametrize("fields", [
    {"op": "add"}, {"strength": 2.0}, {"options": {"angle": 90}}, {"site": "router"}, {"kind": "vector"}])
def test_what_is_only_read_has_nothing_of_what_is_applied(fields: dict[str, Any]) -> None:
    given = {"name": "fine", "kind": "normality", "site": "resid_post"}
    assert Metadata.parse(given).op is None
    with pytest.raises(InvalidMetadata) as caught:
        Metadata.parse({**given, **fields})
    assert caught.value.param in ("metadata", f"metadata.{next(iter(fields))}")


def test_options_of_the_op_are_validated_but_may_be_left_to_the_request() -> None:
    plane = {"kind": "subspace", "op": "rotate"}
    assert metadata(**plane).options == {}
    assert metadata(**plane, options={"angle": 90}).options == {"angle": 90}
    with pytest.raises(InvalidMetadata) as caught:
        metadata(**plane, options={"mode": "by"})
    assert caught.value.param == "metadata.options.angle"


def test_width_is_filled_in_and_checked() -> None:
    assert check(metadata(), vector_payload(0, width=12), Limits()).d_model == 12
    assert check(metadata(site="mlp_act"), vector_payload(0, width=12), Limits()).d_model is None
    with pytest.raises(InvalidMetadata) as caught:
        check(metadata(d_model=13), vector_payload(0, width=12), Limits())
    assert caught.value.param == "metadata.d_model"
    uneven = Payload.build("vector", {0: {"vector": torch.ones(4)}, 1: {"vector": torch.ones(5)}})
    with pytest.raises(InvalidMetadata, match="layer 1 is 5 wide"):
        check(metadata(), uneven, Limits())


def test_default_layers_need_numbers() -> None:
    check(metadata(layers=[1, -1]), vector_payload(0, layers=(1, 2)), Limits())
    with pytest.raises(InvalidMetadata) as caught:
        check(metadata(layers=[1, 5]), vector_payload(0, layers=(1, 2)), Limits())
    assert caught.value.param == "metadata.layers"
    # One layer's direction at every layer, as the refusal-direction method uses it.
    check(metadata(op="ablate", layers=[1, 5], options={"multi_site": True, "source_layer": 1}),
          vector_payload(0, layers=(1, 2)), Limits())


def test_kind_must_be_that_of_the_numbers() -> None:
    with pytest.raises(InvalidMetadata) as caught:
        check(metadata(kind="probe"), vector_payload(0), Limits())
    assert caught.value.param == "metadata.kind"


@pytest.mark.parametrize("limits", [Limits(payload_bytes=63), Limits(layers=1), Limits(document_bytes=50)])
def test_sizes_are_limited(limits: Limits) -> None:
    check(metadata(), vector_payload(0), Limits(payload_bytes=64, layers=2, document_bytes=1000))
    with pytest.raises(PayloadTooLarge) as caught:
        check(metadata(), vector_payload(0), limits)
    assert status_of(caught.value) == 413


def test_metadata_that_could_not_be_read_back_is_refused() -> None:
    deep: dict[str, object] = {}
    inner = deep
    for _ in range(250):
        inner["a"] = {}
        inner = inner["a"]  # type: ignore[assignment]
    with pytest.raises(InvalidMetadata):
        check(metadata(provenance=deep), vector_payload(0), Limits())


def test_document_is_read_back_equal() -> None:
    full = metadata(layers={"depth": [0.25, 0.5]}, strength={"value": 1.5, "unit": "rel"},
                    options={"norm_match": False},
                    tags=["b", "a"], residual_norm={3: 1.25}, sigma={3: 0.1}, provenance={"report": {"auc": [0.9]}},
                    card={"window": [0.5, 2]}, description="Two\nlines", model_id="lab-dense", fingerprint="ab" * 32)
    assert Metadata.model_validate_json(full.document()) == full
    assert metadata(**{**full.model_dump(), "name": "cheerful"}).document() == full.document()


def test_a_manifold_has_a_label_for_every_knot() -> None:
    meta, payload = every_kind()["manifold"]
    named = metadata(kind="manifold", op="manifold", options={"labels": list("abcde")})
    assert check(named, payload, Limits()).options == {"labels": list("abcde")}
    with pytest.raises(InvalidMetadata) as caught:
        check(metadata(kind="manifold", op="manifold", options={"labels": list("abcd")}), payload, Limits())
    assert caught.value.param == "metadata.options.labels"
