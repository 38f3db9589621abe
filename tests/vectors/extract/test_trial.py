"""The trial: a planted direction is found and its default lies in the band; what does nothing ends as a draft."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import torch

from steering.language.vocabulary import Site
from steering.programs.program import Program
from tests.vectors.extract.toy import NUM_LAYERS, VOCAB, Toy, never, noise, silent, unit
from vectors.artifact import Artifact
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.recipe import Recipe
from vectors.extract.run import chance_warnings
from vectors.extract.spans import differing
from vectors.extract.trial.bench import Asked
from vectors.extract.trial.effort import BUDGETS, Budget
from vectors.extract.trial.picture import draw
from vectors.extract.trial.places import at
from vectors.extract.trial.plan import Candidate, TrialOptions, TrialPlan
from vectors.extract.trial.search import SMALL_STRIDE, STRIDE, _best, _refined, next_share
from vectors.extract.trial.surface import Arm, band_of, verdict
from vectors.extract.work import Span, Work

GOOD = tuple("lovely bright kind sweet warm happy gentle cheerful friendly pleasant wonderful delightful beautiful "
             "charming brilliant perfect excellent generous peaceful glorious splendid superb fantastic "
             "marvellous".split())
BAD = tuple("awful dark cruel bitter cold sad harsh gloomy hostile unpleasant terrible dreadful ugly nasty stupid "
            "broken horrible selfish violent miserable dismal rotten shameful disgusting".split())
PLAIN = tuple("river house stone table paper street window garden morning evening winter summer village market teacher "
              "letter kitchen station mountain forest kettle blanket carpet bottle".split())
# Reading sees the tone at every layer, but the next word depends on what is done at this one.
WORKING = 1
# What the words of a tone lack in log-odds before anything is steered, and how far the model may be driven.
SHY, TOO_FAR = 0.9, 2.6


class Moody(Toy):
    def __init__(self) -> None:
        super().__init__()
        for word in (*GOOD, *BAD, *PLAIN):
            self.token(word)
        self.tone = {**{self.token(word): 4.0 for word in GOOD}, **{self.token(word): -4.0 for word in BAD}}

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.stack([noise("e", token) + self.tone.get(token, 0.0) * unit("tone") for token in ids])

    def forward(self, ids: Sequence[int], program: Program | None, prompt_length: int,
                seen: dict[tuple[Site, int], torch.Tensor]) -> torch.Tensor:
        super().forward(ids, program, prompt_length, seen)
        added = seen["resid_post", WORKING][-1] - seen["resid_post", WORKING - 1][-1]
        drive = float(added @ unit("tone"))
        logits = torch.full((VOCAB,), -20.0, dtype=torch.float64)
        for offset, words in ((drive - SHY, GOOD), (-drive - SHY, BAD), (0.0, PLAIN)):
            for n, word in enumerate(words):
                logits[self.token(word)] = offset + (6.0 if n == (7 * len(ids) + ids[1]) % len(words) else 0.0)
        if abs(drive) > TOO_FAR:
            logits[self.token("lovely")] = 40.0
        return logits


def pairs(count: int = 40, *, shuffled: bool = False) -> list[dict[str, Any]]:
    chance = random.Random(3)
    found = []
    for n in range(count):
        about = f"thing{n % 20} is"
        sides = [" ".join(chance.sample(words, 3)) for words in (GOOD, BAD)]
        if shuffled and n % 2:
            sides.reverse()
        found.append({"positive": f"{about} {sides[0]} {n}", "negative": f"{about} {sides[1]} {n}"})
    return found


def extract(given: list[dict[str, Any]], **fields: Any) -> Extraction:
    request = parse_request("mean_difference", {"name": "tone", "pairs": given, **fields})
    return prepare("mean_difference", request, Moody(), "test").run(silent, never)


@pytest.fixture(scope="module")
def found() -> Iterator[Extraction]:
    with pytest.MonkeyPatch.context() as patched:
        # What a trial does stays as it is; the toy, which keeps nothing between tokens, only writes less.
        patched.setitem(BUDGETS, "quick", Budget(layers=3, places=2, pairs=2, scout=2, prompts=3, rounds=2, draws=4,
                                                 tokens=10))
        yield extract(pairs(), trial={"instruction": "be kind"})


def test_the_layer_that_acts_is_taken_though_others_read_as_well(found: Extraction) -> None:
    layers = found.report["layers"]
    assert {layers[str(n)]["dev"]["auc"] for n in range(NUM_LAYERS)} == {1.0}
    assert found.metadata.layers is not None and WORKING in found.metadata.layers
    assert found.metadata.card is not None and "draft" not in found.metadata.card


def test_the_default_lies_in_the_band_and_is_visible_and_whole(found: Extraction) -> None:
    trial = found.report["trial"]
    assert trial["band"]["low"] <= found.metadata.strength.value <= trial["band"]["high"]
    assert trial["default"]["success"] >= trial["untouched"]["success"] + 0.5
    assert trial["default"]["success"] > max(trial["random"]["success"])
    assert trial["default"]["broken"] <= trial["untouched"]["broken"]
    # The control: strengths beyond the band were tried, and are not whole.
    assert [arm["broken"] for arm in trial["surface"] if arm["strength"] > trial["band"]["high"]] == [1.0]


def test_what_a_trial_found_is_on_the_card_and_makes_a_picture(found: Extraction) -> None:
    card = found.metadata.card
    assert card is not None and card["trial"] == found.report["trial"]
    assert card["trial"]["instructed"]["instruction"] == "be kind"
    assert draw(card["trial"], "tone@1", "png").startswith(b"\x89PNG")


def test_pairs_that_mean_nothing_end_as_a_draft_with_a_warning() -> None:
    made = extract(pairs(shuffled=True))
    assert made.metadata.card is not None
    assert made.metadata.card["draft"]
    assert any(warning.startswith("draft:") for warning in made.metadata.card["warnings"])
    assert made.report["warnings"] == made.metadata.card["warnings"]
    artifact = Artifact(made.metadata, 1, "d", 0, (1,), (), datetime.now(UTC))
    assert artifact.to_source(made.payload).warnings == tuple(made.metadata.card["warnings"])


@pytest.mark.parametrize(("positive", "negative", "expected"), [
    # What both have in common at either end is left out: the prompt, and the mark that closes the turn.
    ([9, 8, 1, 2, 7], [9, 8, 3, 4, 5, 7], ([2, 3], [2, 3, 4])),
    ([9, 1], [9, 2], ([1], [1])),
    # Nothing in common but the sink, which is no text.
    ([1, 2, 3], [4, 5], ([1, 2], [1])),
    # One only goes on behind the other.
    ([9, 8, 1], [9, 8], ([2], [1])),
    ([1], [2], ([0], [0])),
])
def test_the_tokens_that_differ(positive: list[int], negative: list[int], expected: tuple[list[int], list[int]]
                                ) -> None:
    assert tuple(map(list, differing(positive, negative))) == expected


def arm(strength: float, success: float, broken: float = 0.0) -> Arm:
    return Arm(strength / 10, strength, success, broken, success, 1.0, 0.0, 8)


BASE = arm(0.0, 0.1)


@pytest.mark.parametrize(("tried", "expected"), [
    # Nothing was seen yet: a larger step. What succeeds may succeed more at a slightly larger one.
    ([arm(2, 0.1)], 0.2 * STRIDE),
    ([arm(2, 0.9)], 0.2 * SMALL_STRIDE),
    # Broken: a smaller one; and then what lies between.
    ([arm(2, 0.0, broken=1.0)], 0.2 / STRIDE),
    ([arm(2, 0.0, broken=1.0), arm(1, 0.3)], 0.2 / 2 ** 0.5),
])
def test_the_next_strength_depends_on_what_the_last_one_did(tried: list[Arm], expected: float) -> None:
    assert next_share(tried, BASE) == pytest.approx(expected)


def test_steered_texts_need_be_no_better_than_those_that_were_asked_for() -> None:
    """Where the model writes half of its texts broken even when it is asked in words, a vector may do so too."""
    found = arm(2, 0.5, broken=0.5)
    assert "breaks" in (verdict(found, BASE, [BASE]) or "")
    assert verdict(found, replace(BASE, broken=0.5), [BASE]) is None


def test_the_band_is_what_is_visible_and_whole_around_the_best() -> None:
    band = band_of([arm(1, 0.2), arm(2, 0.7), arm(4, 0.9), arm(8, 0.8), arm(16, 0.9, broken=0.5)], BASE)
    assert band is not None
    assert (band.low, band.high, band.default) == (2, 8, pytest.approx(4.0))
    assert band_of([arm(1, 0.2), arm(2, 0.25)], BASE) is None
    assert band_of([arm(1, 0.9, broken=0.3)], BASE) is None


def test_texts_that_are_unlikely_on_average_end_the_band_before_many_are_broken() -> None:
    arms = [arm(1, 0.6), arm(2, 0.6, broken=0.125), replace(arm(4, 0.9, broken=0.125), surprise=BASE.surprise + 0.6)]
    band = band_of(arms, BASE)
    assert band is not None and (band.low, band.high) == (1, 2)
    assert band_of(arms[2:], BASE) is None
    # Where such texts are usual, because the wanted ones are, they are whole.
    assert band_of(arms[2:], replace(BASE, surprise=BASE.surprise + 0.3)) is not None


def test_the_best_of_a_place_is_whole_if_any_is() -> None:
    """One that succeeds more with texts that are unlikely would break others; alone, it is the best there is."""
    unlikely = replace(arm(4, 0.9), surprise=BASE.surprise + 0.4)
    assert _best([arm(2, 0.6), unlikely], BASE).success == 0.6
    assert _best([unlikely], BASE) is unlikely


class Even:
    """A bench where a place is as good as `success` says, by its number of layers, and breaks beyond a step of 0.4."""

    def __init__(self, success: dict[int, float]) -> None:
        self.success = success

    def arms(self, asked: Sequence[Asked], step: Any) -> list[Arm]:
        return [Arm(one.share, one.strength, self.success[len(one.vectors)], float(one.share > 0.4), 0.5, 1.0, 0.0, 12)
                for one in asked]


@pytest.mark.parametrize(("single", "layers"), [(0.9, (0, 1, 2)), (1.0, (0, 1, 2)), (1.0 + 0.11, (1,))])
def test_a_band_is_taken_unless_a_single_layer_is_clearly_better(single: float, layers: tuple[int, ...]) -> None:
    vectors = {layer: torch.ones(4, dtype=torch.float64) for layer in range(3)}
    plan = TrialPlan(TrialOptions(), "resid_post", [Candidate("read", vectors)], dict.fromkeys(range(3), 2.0), (), (),
                     None)
    # When all were scouted, single layers were the best two.
    scouted = {at(plan, "read", (1,)): [arm(2, 0.9)], at(plan, "read", (0,)): [arm(2, 0.88)],
               at(plan, "read", (0, 1, 2)): [arm(2, 0.85)]}
    span = Span(Work(Moody(), silent, never, "test"), 0.0, 1.0, "trial")
    bench: Any = Even({1: single, 3: 0.8})
    place, arms = _refined(plan, bench, scouted, (), BASE, span)
    assert place.layers == layers
    # Strengths beyond the best were tried until texts broke.
    assert [one.whole(BASE) for one in arms] == [True] * (len(arms) - 1) + [False]


@pytest.mark.parametrize(("found", "random", "reason"), [
    (arm(4, 0.9), [0.1, 0.3], None),
    (arm(4, 0.9), [0.1, 0.9], "nothing that was tried beat random vectors"),
    (arm(4, 0.2), [0.1], "no strength is both visible and whole"),
    (arm(4, 0.9, broken=0.4), [0.1], "the text breaks before the effect shows"),
])
def test_the_verdict(found: Arm, random: list[float], reason: str | None) -> None:
    said = verdict(found, BASE, [arm(4, success) for success in random])
    assert said is None if reason is None else said is not None and said.startswith(reason)


@pytest.mark.parametrize(("card", "count"), [
    ({"test": {"auc": 0.42}, "shuffled_percentile": 20.0}, 2), ({"test": {"auc": 0.9}, "random_percentile": 100.0}, 0),
    ({"test": {}}, 0)])
def test_chance_is_said(card: dict[str, Any], count: int) -> None:
    assert len(chance_warnings(card, Recipe.chance)) == count
