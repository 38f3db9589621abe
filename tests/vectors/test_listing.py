import random

import pytest

from steering.language.errors import InvalidRequest
from steering.language.spec import Spec
from tests.vectors.making import every_kind, metadata, vector_payload
from vectors import Filter, Library
from vectors.library.paging import ORDERS


def names(library: Library, filter: Filter = Filter()) -> list[str]:  # noqa: B008
    return [artifact.metadata.name for artifact in library.list(filter).items]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("limit", [1, 3, 4, 12, 13])
def test_pages_are_complete_and_in_order(library: Library, order: str, limit: int) -> None:
    made = [f"n{i:02}" for i in range(12)]
    random.Random(limit).shuffle(made)
    for name in made:
        library.create(metadata(name), vector_payload(1))
    seen, cursor = [], None
    while True:
        page = library.list(order=order, limit=limit, cursor=cursor)
        seen += [artifact.metadata.name for artifact in page.items]
        cursor = page.cursor
        if cursor is None:
            break
        assert len(page.items) == limit
    expected = sorted(made) if order.endswith("name") else made
    assert seen == (expected[::-1] if order.startswith("-") else expected)


@pytest.mark.parametrize("order", ORDERS)
def test_paging_stands_inserts_deletes_and_new_versions(library: Library, order: str) -> None:
    stay = [f"stay{i:02}" for i in range(20)]
    for i, name in enumerate(stay):
        library.create(metadata(name), vector_payload(1))
        library.create(metadata(f"go{i:02}"), vector_payload(1))
    chance = random.Random(order)
    seen, cursor = [], None
    for step in range(100):
        page = library.list(order=order, limit=3, cursor=cursor)
        seen += [artifact.metadata.name for artifact in page.items]
        cursor = page.cursor
        if cursor is None:
            break
        library.create(metadata(f"{chance.choice('azm')}new{step}"), vector_payload(1))
        library.create(metadata(chance.choice(stay)), vector_payload(step + 2))
        if step < 20:
            library.delete(f"go{step:02}")
    assert cursor is None
    assert len(set(seen)) == len(seen)
    assert sorted(name for name in seen if name.startswith("stay")) == stay


def test_filters_look_at_the_version_that_the_name_means(library: Library) -> None:
    for meta, payload in every_kind().values():
        library.create(meta, payload)
    library.create(metadata("tagged", tags=["Mood".lower()], model_id="lab-dense"), vector_payload(1))
    library.create(metadata("moved", tags=["old"]), vector_payload(1))
    library.create(metadata("moved", tags=["new"], site="resid_pre"), vector_payload(2))
    assert names(library, Filter(kind="probe")) == ["a-probe"]
    assert names(library, Filter(op="rotate")) == ["a-subspace"]
    assert names(library, Filter(site="router")) == ["a-expert-set"]
    assert names(library, Filter(tag="mood")) == ["tagged"]
    assert names(library, Filter(model_id="lab-dense")) == ["tagged"]
    assert names(library, Filter(tag="old")) == []
    assert names(library, Filter(tag="new", site="resid_pre", kind="vector")) == ["moved"]
    library.set_alias("moved", "production", 1)
    assert names(library, Filter(tag="old", site="resid_post")) == ["moved"]
    assert library.list(Filter(tag="old")).items[0].aliases == ("production",)


def test_search_reads_name_description_and_tags_literally(library: Library) -> None:
    library.create(metadata("calm", description="Speaks in a QUIET way, 100% of the time"), vector_payload(1))
    library.create(metadata("loud_voice", tags=["noise"]), vector_payload(1))
    library.create(metadata("plain"), vector_payload(1))
    found = {q: names(library, Filter(q=q)) for q in ("quiet", "CALM", "100%", "%", "_", "noi", "\\", "zzz", "")}
    assert found == {"quiet": ["calm"], "CALM": ["calm"], "100%": ["calm"], "%": ["calm"], "_": ["loud_voice"],
                     "noi": ["loud_voice"], "\\": [], "zzz": [], "": ["calm", "loud_voice", "plain"]}


@pytest.mark.parametrize("arguments", [
    {"limit": 0}, {"limit": -1}, {"limit": 1001}, {"order": "size"}, {"cursor": "rubbish"}, {"cursor": "é"},
    {"cursor": ""}, {"cursor": "AAAA"}, {"cursor": "W10="}, {"cursor": "WyJjcmVhdGVkIiwgMV0="},
    {"cursor": "WyJuYW1lIiwgMV0="}, {"cursor": "WyJuYW1lIiwgbnVsbF0="},
    {"filter": Filter(q="x" * 300)}, {"filter": Filter(q="\x00")}, {"filter": Filter(tag="\ud800")},
    {"filter": Filter(model_id="\x00")},
])
def test_wrong_questions(library: Library, arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        library.list(**arguments)  # type: ignore[arg-type]
    assert caught.value.param is not None


def test_huge_number_in_a_cursor(library: Library) -> None:
    # ["created", 10**30]
    with pytest.raises(InvalidRequest):
        library.list(order="created", cursor="WyJjcmVhdGVkIiwgMTAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMF0=")


def test_presets_are_listed_apart_from_artifacts(library: Library) -> None:
    library.create(metadata("cheerful"), vector_payload(1))
    for name in ("happy", "merry", "sad"):
        library.presets.create(name, Spec.model_validate({"interventions": [{"artifact": "cheerful"}]}), f"Is {name}")
    assert names(library) == ["cheerful"]
    first = library.presets.list(limit=2)
    second = library.presets.list(limit=2, cursor=first.cursor)
    assert [p.name for p in first.items + second.items] == ["happy", "merry", "sad"]
    assert second.cursor is None
    assert [p.name for p in library.presets.list(q="IS ME").items] == ["merry"]
