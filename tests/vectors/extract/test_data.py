"""Bad pairs are refused by type and field; splits never share an item."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.language.errors import InvalidRequest
from tests.vectors.extract.planted import FACTS, FILLER, FIRST_ITEM, NEGATIVE, POSITIVE, pairs
from vectors.extract.contract import Pair
from vectors.extract.data import SPLITS, prepare
from vectors.extract.refusals import EmptyText, LeakingSplit, NoContrast, TextTooLong, TooFewPairs


def with_pair(number: int, **fields: Any) -> list[Pair]:
    """Twenty good pairs of which one has `fields` changed."""
    changed = pairs(20)
    changed[number] = changed[number].model_copy(update=fields)
    return changed


def splits_of(count: int, *names: str) -> list[Pair]:
    return [pair.model_copy(update={"split": names[n % len(names)]}) for n, pair in enumerate(pairs(count))]


REFUSED = [
    (with_pair(3, positive=()), EmptyText, "pairs[3].positive"),
    (with_pair(3, negative=()), EmptyText, "pairs[3].negative"),
    (with_pair(4, positive=(5,) * 17), TextTooLong, "pairs[4].positive"),
    (with_pair(5, negative=(FILLER, FIRST_ITEM + 5, POSITIVE)), NoContrast, "pairs[5]"),
    (with_pair(6, positive=(1000,)), InvalidRequest, "pairs[6].positive"),
    (with_pair(6, positive=(-1,)), InvalidRequest, "pairs[6].positive"),
    ([*pairs(20), pairs(1)[0]], LeakingSplit, "pairs[20]"),
    ([*pairs(20), Pair(positive=pairs(1)[0].negative, negative=pairs(1)[0].positive)], NoContrast, "pairs[20]"),
    ([pair.model_copy(update={"item": "same"}) for pair in splits_of(20, "train", "dev", "test")], LeakingSplit,
     "pairs[1].split"),
    ([*splits_of(20, "train", "dev", "test"), *pairs(1, first=50)], InvalidRequest, "pairs[20].split"),
    (splits_of(20, "train", "dev"), TooFewPairs, "pairs"),
    (pairs(9), TooFewPairs, "pairs"),
    ([pair.model_copy(update={"item": f"{n % 9}"}) for n, pair in enumerate(pairs(40))], TooFewPairs, "pairs"),
    ([], TooFewPairs, "pairs"),
]


@pytest.mark.parametrize(("bad", "error", "param"), REFUSED)
def test_bad_pairs_are_refused(bad: list[Pair], error: type[InvalidRequest], param: str) -> None:
    with pytest.raises(error) as caught:
        prepare(bad, "last", FACTS, 0)
    assert type(caught.value) is error
    assert caught.value.param == param


def test_a_token_position_must_exist_in_every_text() -> None:
    short = with_pair(7, positive=(FILLER, POSITIVE))
    assert prepare(short, -2, FACTS, 0)
    with pytest.raises(InvalidRequest) as caught:
        prepare(short, 2, FACTS, 0)
    assert caught.value.param == "token"
    assert "pairs[7].positive" in caught.value.message


@given(st.lists(st.integers(0, 40), min_size=30, max_size=120), st.integers(0, 2**32 - 1))
def test_splits_cover_every_pair_once_and_share_no_item(about: list[int], seed: int) -> None:
    given_pairs = [Pair(positive=(FILLER, n + 10, POSITIVE), negative=(FILLER, n + 10, NEGATIVE), item=str(item))
                   for n, item in enumerate(about)]
    if len(set(about)) < 10:
        with pytest.raises(TooFewPairs):
            prepare(given_pairs, "last", FACTS, seed)
        return
    data = prepare(given_pairs, "last", FACTS, seed)
    assert sorted(n for split in SPLITS for n in data.splits[split]) == list(range(len(about)))
    items = {split: {about[n] for n in data.splits[split]} for split in SPLITS}
    assert not items["train"] & items["dev"]
    assert not (items["train"] | items["dev"]) & items["test"]
    assert len(items["train"]) > len(items["dev"])


def test_the_hash_tells_data_apart_and_is_stable() -> None:
    base = prepare(pairs(20), "last", FACTS, 0)
    assert prepare(pairs(20), "last", FACTS, 0) == base
    assert prepare(pairs(20), "last", FACTS, 1).digest != base.digest
    assert prepare(pairs(21), "last", FACTS, 0).digest != base.digest
    assert prepare(with_pair(0, positive=(FILLER, 999, POSITIVE)), "last", FACTS, 0).digest != base.digest


def test_given_splits_are_kept() -> None:
    data = prepare(splits_of(30, "test", "train", "dev"), "last", FACTS, 0)
    assert data.splits == {"train": tuple(range(1, 30, 3)), "dev": tuple(range(2, 30, 3)),
                           "test": tuple(range(0, 30, 3))}
