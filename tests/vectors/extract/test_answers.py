"""Whole answers decide where a grader is named: a text that begins as wanted and breaks behind it is no success."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.language.errors import InvalidRequest
from tests.vectors.extract.test_function_vector import TaskToy
from tests.vectors.extract.test_function_vector import extract as task
from tests.vectors.extract.test_heads import HeadToy, ablation, examples, shift
from tests.vectors.extract.test_refusal_direction import Refuser, extract
from tests.vectors.extract.toy import VOCAB
from vectors.extract import answers
from vectors.extract.answers import MOST_QUESTIONS, AnsweredOptions
from vectors.extract.registry import RECIPES

WORDS, DRAWS = 20, 6
NO_SORRY = {"kind": "regex", "pattern": r"\A(?!.*Sorry)"}
SORRY = {"kind": "regex", "pattern": r"Sorry"}


class Talker(Refuser):
    """Says sorry first where it refuses, and then other words one after the other."""

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(VOCAB, dtype=torch.float64)
        logits[self.token(self.next_word(ids))] = 4.0
        said = self.said(ids)
        # What is said after the prompt's last word.
        after = said[len(said) - said[::-1].index("please"):]
        refuses = 16 * float(resid @ self.direction / self.direction.norm() ** 2) - 4
        logits[self.token("Sorry")] = refuses if not after else -9.0
        return logits

    def next_word(self, ids: Sequence[int]) -> str:
        return f"word{len(ids)}"


class Stammerer(Talker):
    """Without the refusal it says one word for ever, which first tokens do not tell."""

    def next_word(self, ids: Sequence[int]) -> str:
        return f"word{len(ids)}" if "Sorry" in self.said(ids) else "la"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "TOKENS", WORDS)
    monkeypatch.setattr(answers, "DRAWS", DRAWS)


def card(toy: Refuser, **fields: Any) -> dict[str, Any]:
    return extract(toy, **fields).metadata.card or {}


def test_answers_that_are_whole_and_as_wanted_make_a_finished_artifact() -> None:
    made = card(Talker(), grader=NO_SORRY)
    judged = made["answers"]
    assert judged["untouched"]["success"] == 0 and judged["steered"]["success"] == 1
    assert judged["steered"]["broken"] == 0 and judged["random"]["percentile"] >= 95
    assert judged["random"]["draws"] == DRAWS and judged["questions"] <= MOST_QUESTIONS
    assert len(judged["steered"]["samples"][0]["text"].split()) == WORDS and "draft" not in made


def test_answers_that_break_behind_their_first_word_make_a_draft() -> None:
    """The control: the same model without a grader, of which first tokens see nothing."""
    made, plain = card(Stammerer(), grader=NO_SORRY), card(Stammerer())
    assert "draft" not in plain and plain["random_percentile"] >= 95 and "answers" not in plain
    assert made["answers"]["steered"]["broken"] == 1 and made["answers"]["steered"]["success"] == 0
    assert "whole answers" in made["draft"] and f"draft: {made['draft']}" in made["warnings"]


def test_a_direction_to_add_is_judged_on_prompts_that_lack_the_behaviour() -> None:
    made = card(Talker(), grader=SORRY, op="add")
    assert made["answers"]["untouched"]["success"] == 0 and made["answers"]["steered"]["success"] == 1
    assert all("good" in sample["prompt"] for sample in made["answers"]["steered"]["samples"])


class Answerer(TaskToy):
    """Goes on with other words once it has answered."""

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        if self.said(ids)[-1] == "->":
            return super().read(ids, resid)
        logits = torch.zeros(VOCAB, dtype=torch.float64)
        logits[self.token(f"word{len(ids)}")] = 4.0
        return logits


@pytest.mark.parametrize("planted", [True, False])
def test_a_task_is_judged_by_the_answers_it_has(planted: bool) -> None:
    found = task(Answerer(planted=planted), grader={"kind": "choice", "match": "first"})
    made = found.metadata.card or {}
    assert ("draft" in made) is not planted
    assert made["answers"]["untouched"]["success"] == 0
    assert found.report["answers"] == made["answers"]


QUESTIONS = [f"t{n} down" for n in range(2)]


class HeadTalker(HeadToy):
    """Goes on with other words once it has answered."""

    def forward(self, ids: Any, program: Any, prompt_length: int, seen: Any) -> torch.Tensor:
        logits = super().forward(ids, program, prompt_length, seen)
        if not {"yes", "no"} & set(self.said(ids)):
            return logits
        other = torch.zeros_like(logits)
        other[self.token(f"word{len(ids)}")] = 9.0
        return other


def test_heads_are_judged_on_the_questions_that_are_given() -> None:
    """Shifted heads, whose own choice looks at no answer, and the control: heads of a model without the concept."""
    for planted in (True, False):
        made = shift(HeadTalker(planted=planted), readout=None, questions=QUESTIONS, strength=6.0,
                     grader={"kind": "regex", "pattern": "yes"}).metadata.card or {}
        judged = made["answers"]
        assert judged["questions"] == len(QUESTIONS) and judged["random"]["draws"] == DRAWS
        if planted:
            assert (judged["untouched"]["success"], judged["steered"]["success"]) == (0, 1)
            assert judged["random"]["mean"] < 1
        else:
            assert judged["steered"]["success"] == judged["untouched"]["success"] and "whole answers" in made["draft"]


def test_a_grader_without_anything_to_ask_is_refused_before_the_model_is_asked() -> None:
    toy = HeadToy()
    with pytest.raises(InvalidRequest, match="nothing is asked") as caught:
        shift(toy, grader={"kind": "regex", "pattern": "yes"})
    assert caught.value.path == ("questions",) and toy.passes == 0


def test_examples_with_answers_are_asked_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "TOKENS", 4)
    made = ablation(HeadTalker(), grader={"kind": "choice", "match": "first"}).metadata.card or {}
    assert made["answers"]["untouched"]["success"] == 1
    assert made["answers"]["steered"]["samples"][0]["prompt"] in {example["text"] for example in examples()}


def test_every_artifact_that_is_applied_can_be_judged_by_whole_answers_or_says_why_it_was_not() -> None:
    for name, recipe in RECIPES.items():
        tried = recipe.finishes == "trial" or issubclass(recipe.request, AnsweredOptions)
        assert tried or recipe.untried or name == "manifold", name
    assert "no grader was named" in card(Talker())["untried"]
    assert "untried" not in card(Talker(), grader=NO_SORRY)
    assert "without a readout" in (shift(readout=None).metadata.card or {})["untried"]
