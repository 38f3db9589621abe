"""Graders of what a text is, without a model: patterns, JSON, choices, lengths, probes."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from steering.programs.reading import Reader
from vectors.evaluate.graders import (
    Answer,
    ChoiceGrader,
    JsonSchemaGrader,
    LanguageGrader,
    LengthGrader,
    ProbeGrader,
    RegexGrader,
    Tools,
    grade,
)
from vectors.evaluate.graders.refusals import GraderUnusable
from vectors.evaluate.reads import reads

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def outcome(grader: Any, text: str, tools: Tools | None = None, **fields: Any) -> str:
    (verdict,) = grade(grader, [Answer(text, **fields)], tools)
    assert verdict.success == (verdict.outcome in ("match", "valid", "right", "within", "above")) or verdict.reasons
    return verdict.outcome


def test_a_pattern_is_looked_for() -> None:
    assert outcome(RegexGrader(pattern=r"\bParis\b"), "It is Paris.") == "match"
    assert outcome(RegexGrader(pattern=r"^Paris"), "It is Paris.") == "no_match"
    assert outcome(RegexGrader(pattern="paris", ignore_case=True), "PARIS") == "match"
    assert grade(RegexGrader(pattern="x", wanted="no_match"), [Answer("Yes.")])[0].success


def test_a_pattern_that_never_ends_is_stopped() -> None:
    text = " ".join(f"{first}{second}" for first in "bcdfghjk" for second in "aeioulmnprst")
    with pytest.raises(GraderUnusable, match="pattern") as refused:
        outcome(RegexGrader(pattern=r"^(\w|\w\w|\s)+\b\B"), text)
    assert refused.value.param == "grader.pattern"


@pytest.mark.parametrize(("text", "expected"), [
    ('{"age": 3}', "valid"), ('```json\n{"age": 3}\n```', "valid"), ('{"age": "3"}', "invalid"), ("{}", "invalid"),
    ("[" * 5000, "not_json"),
    ('Here: {"age": 3}', "not_json"), ('{"age": 3', "not_json"), ('{"age": NaN}', "not_json")])
def test_json_is_held_against_a_schema(text: str, expected: str) -> None:
    assert outcome(JsonSchemaGrader(json_schema=SCHEMA), text) == expected


def test_references_out_of_the_schema_are_not_followed() -> None:
    grader = JsonSchemaGrader(json_schema={"$ref": "http://127.0.0.1:1/schema.json"})
    with pytest.raises(GraderUnusable, match="does not hold"):
        outcome(grader, "{}")


def test_empty_json_text_is_broken() -> None:
    assert outcome(JsonSchemaGrader(json_schema=SCHEMA), " ") == "broken"


@pytest.mark.parametrize(("text", "expected"), [
    ("Paris", "right"), (" paris. ", "right"), ("**Paris**", "right"), ("Lyon", "wrong"), ("Paris is big", "wrong")])
def test_an_exact_answer(text: str, expected: str) -> None:
    assert outcome(ChoiceGrader(), text, expected=("Paris",)) == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("B", "right"), ("(b)", "right"), ("The answer is B.", "right"), ("B. Because it is so", "right"),
    ("A dog is an animal, so the answer is B", "right"), ("C) and not B)", "wrong"), ("I do not know", "other")])
def test_a_choice_of_letters(text: str, expected: str) -> None:
    grader = ChoiceGrader(match="first", correct=["B"], options=["A", "B", "C", "D"])
    assert outcome(grader, text) == expected


def test_the_first_that_is_named_counts() -> None:
    grader = ChoiceGrader(match="first", correct=["New York"], options=["York", "London"])
    assert outcome(grader, "It is New York, not London.") == "right"
    assert outcome(grader, "Not Londonderry, but York") == "wrong"


def test_a_choice_without_a_right_answer_is_refused() -> None:
    with pytest.raises(GraderUnusable) as refused:
        outcome(ChoiceGrader(), "Paris")
    assert refused.value.param == "grader.correct"


@pytest.mark.parametrize(("text", "ended", "expected"), [
    ("One two three.", True, "within"), ("One.", True, "shorter"), ("One two three four five.", True, "longer"),
    ("One two three", False, "cut"), ("One two three four five", False, "longer")])
def test_lengths(text: str, ended: bool, expected: str) -> None:
    assert outcome(LengthGrader(least=2, most=4), text, ended=ended) == expected


def test_sentences_are_counted() -> None:
    assert outcome(LengthGrader(unit="sentences", most=2), "It rains. It is cold! Stay in.") == "longer"
    assert outcome(LengthGrader(least=2), "No upper bound here", ended=False) == "within"


@pytest.mark.parametrize(("kind", "wrong"), [
    (RegexGrader, {"pattern": "("}), (JsonSchemaGrader, {"json_schema": {"type": "nothing"}}), (LengthGrader, {}),
    (LengthGrader, {"least": 3, "most": 2}), (LanguageGrader, {"language": "xx"}),
    (RegexGrader, {"pattern": "a", "b": 1})])
def test_options_that_mean_nothing_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(**wrong)


class Subject:
    """Its activations at a layer are the lengths of the words, in both dims."""

    def encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(len(word) for word in prompt.split())

    def capture(self, texts: Any, site: Any, layers: Any, positions: Any, program: Any = None) -> Any:
        return [{layer: torch.tensor([[float(n), float(n)] for n in text]) for layer in layers} for text in texts]


def test_a_probe_reads_the_answer_alone() -> None:
    numbers = {"weight": torch.tensor([1.0, 0.0]), "bias": torch.tensor(-4.0)}
    reader = Reader("long@1", "resid_post", "linear", {3: numbers})
    tools = Tools(probes={"long": reads(reader, Subject())})  # type: ignore[arg-type]
    grader = ProbeGrader(probe="long", threshold=0.0)
    texts = ("the elephants remember everything", "we do it so")
    verdicts = grade(grader, [Answer(text, prompt="never read") for text in texts], tools)
    # Means of the words behind the first: (9 + 8 + 10) / 3 - 4 and (2 + 2 + 2) / 3 - 4.
    assert [verdict.reasons for verdict in verdicts] == [("score 5.000",), ("score -2.000",)]
    assert [verdict.outcome for verdict in verdicts] == ["above", "below"]
    with pytest.raises(GraderUnusable, match="not loaded"):
        grade(grader, [Answer("We do it so.")])
