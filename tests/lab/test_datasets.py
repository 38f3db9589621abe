"""The datasets: as committed, split by underlying item, loadable, true."""

import json

import pytest

from lab import DATA_DIR
from lab.corpus import languages
from lab.corpus.calendar import shifted
from lab.corpus.sentiment import polarity
from lab.corpus.stories import tense_of
from lab.datasets import DATASETS, SPLITS, load, records

PAIRED = [n for n in DATASETS if "positive" in load(n)[0]]


@pytest.mark.parametrize("name", DATASETS)
def test_files_are_what_the_functions_make(name):
    made = json.loads(json.dumps(records(name)))
    assert load(name) == made
    assert (DATA_DIR / f"{name}.jsonl").stat().st_size < 500_000


@pytest.mark.parametrize("name", DATASETS)
def test_splits_are_disjoint_by_item_and_none_is_empty(name):
    items = {split: {r["item"] for r in load(name, split)} for split in SPLITS}
    assert all(items.values())
    assert not items["train"] & items["dev"] and not items["train"] & items["test"]
    assert not items["dev"] & items["test"]
    assert sum(len(load(name, s)) for s in SPLITS) == len(load(name))


@pytest.mark.parametrize("name", PAIRED)
def test_no_text_crosses_a_split(name):
    seen: dict[str, str] = {}
    for record in load(name):
        for text in (record["positive"], record["negative"]):
            assert seen.setdefault(text, record["split"]) == record["split"], text
        assert record["positive"] != record["negative"]


def test_the_pairs_that_methods_need_are_there():
    wanted = {"sentiment", "refusal", "emotions", "tense",
              *(f"language_{name}" for name in languages.LANGUAGES)}
    assert wanted <= set(PAIRED)
    assert all(len(load(n)) >= 200 for n in wanted)


def test_sides_of_pairs_are_what_they_claim():
    for r in load("sentiment"):
        assert (polarity(r["positive"]), polarity(r["negative"])) == ("positive", "negative")
    for r in load("tense"):
        assert (tense_of(r["positive"]), tense_of(r["negative"])) == ("past", "present")
    for name in languages.LANGUAGES:
        for r in load(f"language_{name}"):
            assert languages.language_of(r["positive"]) == name
            assert languages.language_of(r["negative"]) == r["other"] != name


def test_refusal_pairs_come_as_text_and_as_messages():
    for r in load("refusal"):
        for side in ("positive", "negative"):
            asked = r[f"{side}_messages"][0]["content"]
            assert r[side] == f"<|user|>{asked}<|end|><|assistant|>"


def test_calendar_answers_are_true():
    for r in load("calendar"):
        assert r["answer"] == " " + shifted(r["series"], r["start"], r["step"])
    assert len(load("weekday_pool")) == 49


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no dataset"):
        load("weather")
    with pytest.raises(ValueError, match="no split"):
        load("sentiment", "validation")
