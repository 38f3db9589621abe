"""The demands of the hour: each is missed by figures that miss it, and by no others. Its data are what it says."""

from dataclasses import replace

import pytest

from benchmarks.hour.demands import Figures, of_language, unmet
from benchmarks.hour.pairs import FRENCH_PROMPTS, TONE_PROMPTS, french, tone
from lab.real.pairs import FRENCH, TONE
from lab.real.prompts import GREY_DEV, GREY_TEST

GOOD = Figures(untouched=0.4, steered=0.8, random=[0.3, 0.5], broken_untouched=0.0, broken_steered=0.05, french=0.3,
               instructed=0.5, french_by_surprise=0.2)


@pytest.mark.parametrize(("changes", "said"), [
    ({}, []), ({"steered": 0.69}, ["untouched 40%", "random vector 50%"]),
    ({"random": [0.3, 0.51]}, ["random vector 51%"]),
    ({"broken_steered": 0.06}, ["broken answers: 6%"]), ({"french": 0.29}, ["French answers: 29%"]),
    ({"french": 0.0, "instructed": 0.0}, ["to no prompt"]),
    ({"unchanged": ["calm"]}, ["calm does not"])])
def test_a_demand_that_is_not_met_is_said(changes: dict[str, object], said: list[str]) -> None:
    found = unmet(replace(GOOD, **changes))  # type: ignore[arg-type]
    assert len(found) == len(said) and all(part in reason for part, reason in zip(said, found, strict=True))


def test_broken_french_is_not_french() -> None:
    assert of_language(["Le chat dort sur la chaise de la cuisine.", "El threw So joue devant le jardin dimanche",
                        "The cat sleeps on the chair.", "la la la la la la la la la la la la"], "fr") == 0.25


def test_the_data_are_others_than_those_that_were_tuned_on() -> None:
    for pairs, used, prompts in ((tone(), TONE, TONE_PROMPTS), (french(), FRENCH, FRENCH_PROMPTS)):
        assert len(pairs) == 40 and tone() == tone()
        texts = {turns[-1]["content"] for pair in pairs for turns in pair.values()}
        assert len(texts) == 80 and texts.isdisjoint(text for row in used for text in row[1:])
        assert {pair["positive"][0]["content"] for pair in pairs}.isdisjoint(prompts)
        assert len(set(prompts)) == len(prompts) >= 48
    assert set(TONE_PROMPTS).isdisjoint((*GREY_DEV, *GREY_TEST))
