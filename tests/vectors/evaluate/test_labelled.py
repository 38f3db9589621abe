"""Graders against labels given by hand, on texts that neither rules nor limits were chosen on. The shares that
docs/graders.md states are held here, a little below what is measured.
"""

from typing import Any

import pytest

from lab import datasets
from tests.vectors.evaluate.texts import share, texts
from vectors.evaluate.graders import Answer, LanguageGrader, RefusalGrader, SentimentGrader, Tools, WholeGrader, grade
from vectors.evaluate.graders.language import language_of

LANGUAGES = {"english": "en", "french": "fr", "german": "de", "spanish": "es"}


def rows(*, part: str = "test", sure: bool | None = None) -> list[dict[str, Any]]:
    return [row for row in texts() if row["part"] == part and (sure is None or row["sure"] is sure)]


def answers(chosen: list[dict[str, Any]]) -> list[Answer]:
    return [Answer(row["text"], row["prompt"], row["ended"]) for row in chosen]


def surprises(chosen: list[dict[str, Any]]) -> Tools:
    """How far each lies over what is usual for it; texts that nobody measured lie nowhere."""
    over = {row["text"]: row["surprise"] - row["usual"] if row["surprise"] is not None else 0.0 for row in chosen}
    return Tools(surprise=lambda given: [over[answer.text] for answer in given], usual_surprise=0.0)


def broken_right(chosen: list[dict[str, Any]], tools: Tools) -> tuple[float, float]:
    """Of the broken texts the share that is found, of the whole ones the share that is left alone."""
    found = [verdict.outcome == "broken" for verdict in grade(WholeGrader(), answers(chosen), tools)]
    return (share([hit for hit, row in zip(found, chosen, strict=True) if row["label"] == "broken"]),
            share([not hit for hit, row in zip(found, chosen, strict=True) if row["label"] != "broken"]))


def test_there_are_enough_texts_of_every_kind() -> None:
    assert len(texts()) >= 300
    counts = {label: sum(row["label"] == label for row in rows()) for label in ("refusal", "compliance", "broken")}
    assert min(counts.values()) >= 20
    assert len({row["text"] for row in texts()}) == len(texts())


def test_broken_texts_are_found_with_surprise() -> None:
    chosen = rows(sure=True)
    found, spared = broken_right(chosen, surprises(chosen))
    assert found >= 0.95
    assert spared >= 0.95


def test_rules_alone_find_about_half_of_them() -> None:
    found, spared = broken_right(rows(sure=True), Tools())
    assert found >= 0.5
    assert spared >= 0.97


def test_texts_that_people_would_argue_about() -> None:
    """Labels that are not sure are met less often; the share is stated too."""
    chosen = rows(sure=False)
    found = [verdict.outcome == "broken" for verdict in grade(WholeGrader(), answers(chosen), surprises(chosen))]
    assert share([hit == (row["label"] == "broken") for hit, row in zip(found, chosen, strict=True)]) >= 0.4


def test_refusals_are_told_from_answers() -> None:
    chosen = [row for row in rows() if row["label"] != "broken"]
    judged = RefusalGrader().judge(answers(chosen), Tools())
    assert share([verdict.outcome == row["label"] for verdict, row in zip(judged, chosen, strict=True)]) >= 0.97


def test_all_three_at_once() -> None:
    chosen = rows(sure=True)
    verdicts = grade(RefusalGrader(), answers(chosen), surprises(chosen))
    assert share([verdict.outcome == row["label"] for verdict, row in zip(verdicts, chosen, strict=True)]) >= 0.94


def test_the_language_of_whole_texts() -> None:
    chosen = [row for row in rows() if row["language"]]
    assert share([language_of(row["text"])[0] == row["language"] for row in chosen]) >= 0.98


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_language_of_short_sentences(name: str) -> None:
    sentences = [record["positive"] for record in datasets.load(f"language_{name}", "test")][:60]
    assert len(sentences) >= 40
    code = LANGUAGES[name]
    verdicts = grade(LanguageGrader(language=code), [Answer(text) for text in sentences])
    assert share([verdict.success for verdict in verdicts]) >= 0.97
    other = "fr" if code != "fr" else "de"
    assert share([verdict.success for verdict in grade(LanguageGrader(language=other),
                                                       [Answer(text) for text in sentences])]) <= 0.02


def test_the_sentiment_of_reviews() -> None:
    chosen = [row for row in texts() if row["sentiment"]]
    judged = SentimentGrader().judge(answers(chosen), Tools())
    assert share([verdict.outcome == row["sentiment"] for verdict, row in zip(judged, chosen, strict=True)]) >= 0.85


@pytest.mark.parametrize("text", [
    "El threw So joue devant le jardin dimanche", "Certainly. First, shake simple arbre!!école C water jardin",
    "Last paper forest time forest time28", "?", "", "   \n", "😀 🎉"])
def test_broken_text_never_counts_as_a_success(text: str) -> None:
    for grader in (LanguageGrader(language="fr"), RefusalGrader(), RefusalGrader(wanted="refusal"), SentimentGrader(),
                   SentimentGrader(wanted="neutral"), WholeGrader()):
        (verdict,) = grade(grader, [Answer(text)])
        assert (verdict.outcome, verdict.success) == ("broken", False)
        assert verdict.reasons


@pytest.mark.parametrize("text", [
    "Le chien dort devant la maison et le chat joue dans le jardin.", "Ce n'est pas très bon.",
    "Non, je ne viens jamais assez tôt.", "Adesso non ho abbastanza tempo, ma domani sì.", "Paris.", "42",
    "Yes, I would like that.",
    "1. Mix flour, sugar and eggs.\n2. Add butter.\n3. Bake for 30 minutes at 180 °C.",
    "Visit https://example.org/a_b for more, or write to a@b.org.", "Der Hund läuft über die Straße zum Garten.",
    "The band AC/DC played 'Thunderstruck' (1990) - what a night!", "No, no, no! That was a very, very long day.",
    "Maria Rodriguez and Antonio Del Ferrata live in Buenos Aires with their three children."])
def test_whole_text_is_left_alone(text: str) -> None:
    (verdict,) = grade(WholeGrader(), [Answer(text)])
    assert verdict.success, verdict.reasons


def test_text_that_was_cut_is_whole() -> None:
    text = "The moon is a rocky body that goes around the earth once a month, and we see it because the sun"
    assert grade(WholeGrader(), [Answer(text, ended=False)])[0].success


@pytest.mark.parametrize("text", [
    "It was good. It was good. It was good. It was good. It was good. It was good.", "and and and and and and and and",
    "We went to the sea and the sea and the sea and the sea and the sea and the sea", "ahem kiddo-gwadwadwadwad!"])
def test_loops_are_broken(text: str) -> None:
    (verdict,) = grade(WholeGrader(), [Answer(text)])
    assert not verdict.success


def test_surprise_has_a_limit_over_what_is_usual() -> None:
    text = [Answer("The old clock on the wall sings of green ideas.")]
    near = Tools(surprise=lambda given: [3.0], usual_surprise=2.5)
    far = Tools(surprise=lambda given: [3.6], usual_surprise=2.5)
    assert grade(WholeGrader(), text, near)[0].success
    assert "3.6 nats" in grade(WholeGrader(), text, far)[0].reasons[0]
