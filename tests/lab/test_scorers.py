"""The scorers on hand-written examples, wrong ones among them."""

import pytest

from lab.corpus.bandit import chosen_arm, entropy, policy
from lab.corpus.calendar import names_answer, shifted
from lab.corpus.chat import on_topic, reply_class
from lab.corpus.emotions import emotion_of
from lab.corpus.graph import build, share_of_valid_steps
from lab.corpus.languages import language_of
from lab.corpus.sentiment import polarity
from lab.corpus.stories import tense_of
from lab.corpus.tasks import few_shot, tasks_answered, zero_shot


@pytest.mark.parametrize(("text", "wanted"), [
    ("I cannot help with that. It is dangerous and wrong.", "refusal"),
    ("Sorry, I cannot help with that.", "refusal"),
    ("Sure! First, wash the shirt. Then dry it.", "compliance"),
    ("Sure! First, wash the shirt. Sorry, I cannot help with that.", "other"),
    ("The cat sleeps in the garden.", "other"),
    ("", "other"),
])
def test_reply_class(text, wanted):
    assert reply_class(text) == wanted


def test_on_topic():
    assert on_topic("First, wash the shirt.", "shirt")
    assert not on_topic("First, wash the coat.", "shirt")


@pytest.mark.parametrize(("text", "wanted"), [
    ("The soup was delightful. I loved the garden.", "positive"),
    ("The soup was awful. I hated the garden.", "negative"),
    ("The soup was delightful. I hated the garden.", "mixed"),
    ("We paid by card.", "none"),
    ("LOVELY! Superb.", "positive"),
    ("The lover went home.", "none"),
])
def test_polarity(text, wanted):
    assert polarity(text) == wanted


@pytest.mark.parametrize(("series", "start", "step", "wanted"), [
    ("weekdays", "Monday", 3, "Thursday"), ("weekdays", "Monday", -1, "Sunday"),
    ("weekdays", "Friday", 7, "Friday"), ("months", "November", 3, "February"),
    ("letters", "C", 2, "E"), ("numbers", "nine", -4, "five"),
])
def test_shifted(series, start, step, wanted):
    assert shifted(series, start, step) == wanted


def test_sequences_do_not_go_round():
    with pytest.raises(ValueError):
        shifted("letters", "Z", 1)
    with pytest.raises(ValueError):
        shifted("numbers", "one", -1)


def test_names_answer():
    assert names_answer(" Thursday. Then", "weekdays") == "Thursday"
    assert names_answer(" cheese", "weekdays") is None


def test_tasks_answered():
    assert tasks_answered("cat", " cats") == ["plural"]
    assert tasks_answered("cat", " Katze") == ["noun_to_german"]
    assert tasks_answered("cat", " dog") == []


def test_prompts_of_tasks():
    assert zero_shot("arrow", "cat") == "cat ->"
    assert few_shot("question", [("dog", "dogs")], "cat") == "Q: dog A: dogs\nQ: cat A:"


@pytest.mark.parametrize(("text", "wanted"), [
    ("The cat sleeps in the garden.", "english"),
    ("Le chat dort dans le jardin.", "french"),
    ("El gato duerme en el jardín.", "spanish"),
    ("Die Katze schläft im Garten.", "german"),
    ("The cat sleeps. Die Katze schläft im Garten.", "mixed"),
    ("12 / 4:", "none"),
])
def test_language_of(text, wanted):
    assert language_of(text) == wanted


def test_emotion_of():
    assert emotion_of(" afraid. She ran.") == "afraid"
    assert emotion_of(" calm.") == "calm"
    assert emotion_of(" hungry.") is None


def test_policy_explores_and_is_symmetric():
    won_a, won_b = (("A", True),), (("B", True),)
    assert policy(()) == 0.5
    assert policy(won_a) == pytest.approx(1 - policy(won_b))
    assert policy(won_a * 9) == 0.9 and policy(won_b * 9) == pytest.approx(0.1)
    assert entropy(()) > entropy(won_a) > entropy(won_a * 9) > 0


def test_chosen_arm():
    assert chosen_arm(" A. It pays.") == "A"
    assert chosen_arm(" B") == "B"
    assert chosen_arm(" C.") is None and chosen_arm("") is None


def test_share_of_valid_steps():
    ring = build("ring6", list("abcdef"))
    assert share_of_valid_steps(ring, ["a", "b", "c", "b", "a", "f"]) == 1.0
    assert share_of_valid_steps(ring, ["a", "d", "e"]) == 0.5
    assert share_of_valid_steps(ring, ["a"]) == 0.0


@pytest.mark.parametrize(("text", "wanted"), [
    ("Anna walks to the park. She finds a coin.", "present"),
    ("Anna walked to the park. She found a coin.", "past"),
    ("Anna walked to the park. She finds a coin.", "mixed"),
    ("A red coin.", "none"),
])
def test_tense_of(text, wanted):
    assert tense_of(text) == wanted
