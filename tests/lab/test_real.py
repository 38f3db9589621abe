"""What docs/real-model.md says is what is stored, what is bundled says the same, and data keep to their splits."""

import json
from typing import Any

import pytest

from lab.real import bundle, page
from lab.real.claims import CLAIMS, Claim, facts, questions
from lab.real.concise import DEV, PAIRS, TEST
from lab.real.facts import TASKS, relations
from lab.real.measure import by_text
from lab.real.pairs import FRENCH, PROMPTS, TONE
from lab.real.picture import drawn
from lab.real.prompts import GREY_DEV, GREY_TEST
from lab.real.requests import caution, records, requests
from server.cli.bundled import with_examples
from server.cli.examples import load_examples
from vectors.artifact import Limits
from vectors.evaluate.graders.contract import BROKEN
from vectors.extract import parse_request
from vectors.formats import get_format
from vectors.library import Library

STORED = {claim.name: result for claim in CLAIMS if (result := page.stored(claim)) is not None}
DRAWS = 20
# What a file of a bundled artifact may take.
MOST_BYTES = 100_000


def test_every_result_has_a_claim_and_a_claim_without_results_is_said_to_have_none() -> None:
    assert sorted(path.stem for path in page.RESULTS.glob("*.json")) == sorted(STORED)
    missing = [claim.title for claim in CLAIMS if claim.name not in STORED]
    assert all(f"## {title}\n" not in page.document() for title in missing)
    assert ("not measured yet: " + ", ".join(missing) in page.document()) == bool(missing)
    assert (page.PATH.parent / page.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_the_requests_of_a_claim_are_what_the_methods_take(claim: Claim) -> None:
    parse_request(claim.method.replace("-", "_"), {"name": claim.name, **claim.fields})


def test_results_are_of_one_model_and_beside_as_many_random_artifacts() -> None:
    assert len({result["fingerprint"] for result in STORED.values() if "failed" not in result}) == 1
    for result in STORED.values():
        for test in result["tests"]:
            assert {len(draws) for draws in test["random"].values()} <= {DRAWS}
            assert len(test["texts"]) == test["prompts"] >= 12
    # All but the gate, whose random counterparts are probes.
    bare = {name for name, result in STORED.items() if any(not test["random"] for test in result["tests"])}
    assert bare <= {"harmful"}


@pytest.mark.parametrize("name", STORED)
def test_shares_are_those_of_the_stored_texts(name: str) -> None:
    for test in STORED[name]["tests"]:
        kind = test["grader"]["kind"]
        wanted = test["grader"].get("wanted", {"choice": "right", "length": "within"}.get(kind, "wanted"))
        for place, arm in enumerate(("untouched", "ours")):
            named = [one["outcomes"][place] for one in test["texts"]]
            assert test[arm]["success"] == pytest.approx(named.count(wanted) / len(named), abs=1e-3)
            assert test[arm]["broken"] == pytest.approx(named.count(BROKEN) / len(named), abs=1e-3)
            if test["grader"]["kind"] in ("language", "choice"):
                texts = [one[arm] for one in test["texts"]]
                assert named == by_text(test["grader"], texts, [one["expected"] for one in test["texts"]])


def test_the_page_shows_every_finding_and_texts_of_all_arms() -> None:
    said = page.PATH.read_text(encoding="utf-8")
    for result in STORED.values():
        for one in page.findings(result):
            assert one.verdict in said and one.placebo in said and one.damage in said
        for test in result["tests"]:
            shown = test["texts"][0]
            assert all(" ".join(shown[arm].split()).replace("|", "\\|").replace("<", "&lt;") in said
                       for arm in ("untouched", "ours", "random") if arm in shown)
    assert drawn(list(STORED.values())).axes


@pytest.mark.parametrize("path", sorted(bundle.FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_bundled_card_says_what_the_page_says(path: Any) -> None:
    assert path.stat().st_size < MOST_BYTES
    result = STORED[path.stem]
    metadata, _ = get_format("safetensors").read(path.read_bytes(), {}, Limits())
    card = metadata.card or {}
    assert (metadata.name, metadata.fingerprint) == (path.stem, result["fingerprint"])
    assert [one["verdict"] for one in card["real_model"]] == [one.verdict for one in page.findings(result)]
    assert card.get("draft") == result["draft"]


def test_what_is_bundled_is_published_under_its_names(tmp_path: Any) -> None:
    assert "smollm2" in with_examples()
    library = Library.open(f"sqlite:///{tmp_path / 'library.db'}", str(tmp_path / "blobs"))
    try:
        stored = load_examples(library, "smollm2", tmp_path / "marker")
        assert {f"{path.stem}@1" for path in bundle.FOLDER.glob("*.safetensors")} <= set(stored)
        entries = json.loads((bundle.FOLDER / "presets.json").read_text())
        assert {f"{entry['name']}@1" for entry in entries} <= set(stored) and entries
        assert load_examples(library, "smollm2", tmp_path / "marker") == []
    finally:
        library.close()


def test_no_test_prompt_was_seen_before() -> None:
    asked = {question for question, *_ in (*TONE, *FRENCH, *PAIRS)}
    assert asked.isdisjoint((*GREY_DEV, *GREY_TEST, *DEV, *TEST, *PROMPTS["dev"], *PROMPTS["test"]))
    for dev, test in ((GREY_DEV, GREY_TEST), (DEV, TEST), (PROMPTS["dev"], PROMPTS["test"]),
                      (requests("harmful", "dev"), requests("harmful", "test"))):
        assert len({*dev, *test}) == len(dev) + len(test)
    fitted = {turn["content"] for pair in caution() for turn in pair["positive"]}
    assert fitted.isdisjoint(requests("harmful", "test")) and fitted.isdisjoint(requests("harmless", "test"))


def test_items_stay_in_one_split() -> None:
    tasks = [[{**pair, "item": pair["input"]} for pair in pairs] for pairs in TASKS.values()]
    for rows in (records(), relations(), *tasks):
        splits: dict[str, set[str]] = {}
        for row in rows:
            splits.setdefault(row["item"], set()).add(row["split"])
        assert all(len(found) == 1 for found in splits.values())
    assert {one["prompt"] for one in facts(True, "capital")} == {
        one["text"] for one in relations() if one["label"] == "capital" and one["split"] == "test"}
    assert len(questions("plural")) >= 12


ARM = {"success": 0.2, "broken": 0.0, "perplexity": 5.0, "over": None, "over_broken": None, "tasks": None}


@pytest.mark.parametrize(("ours", "draws", "wanted", "said"), [
    ({"success": 0.7}, [0.1, 0.3], "more", "Works: 50 points, 40 beyond every random draw."),
    ({"success": 0.4}, [0.1, 0.3], "more", "Weak: 20 points, 10 beyond every random draw."),
    ({"success": 0.2}, [0.1, 0.1], "more", "Does not work: nothing is gained."),
    ({"success": 0.7}, [0.1, 0.7], "more", "Does not work: a random artifact does as much."),
    ({"success": 0.7, "broken": 0.1}, [0.1, 0.3], "more",
     "Works: 50 points, 40 beyond every random draw. It breaks 10 % of the texts."),
    ({"success": 0.7, "broken": 0.6}, [0.1, 0.3], "more",
     "Visible and not usable: 50 points, and more than that break. It breaks 60 % of the texts."),
    ({"success": 0.0, "broken": 1.0}, [0.2, 0.1], "fewer",
     "Does not work: the answers are not gone but broken. It breaks 100 % of the texts."),
    ({"success": 0.0}, [0.2, 0.1], "fewer", "Weak: 20 points, 10 beyond every random draw."),
])
def test_a_verdict_goes_by_the_figures(ours: dict[str, float], draws: list[float], wanted: str, said: str) -> None:
    test = {"wanted": wanted, "untouched": ARM, "ours": {**ARM, **ours}, "random": {"success": draws}}
    assert page.verdict(test) == said
