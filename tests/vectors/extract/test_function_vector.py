"""Function vectors on a model one of whose heads carries the task."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.language.errors import TrimtabError, UnsupportedModel
from tests.vectors.extract.toy import HEAD_DIM, NUM_HEADS, VOCAB, Toy, cosine, never, noise, silent, unit
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.methods import function_vector
from vectors.extract.programs import NEXT
from vectors.extract.refusals import (
    EmptyText,
    ExtractionCancelled,
    LeakingSplit,
    NoContrast,
    TextTooLong,
    TooFewExamples,
)
from vectors.extract.subject import Prompt, Tokens

LAYER, HEAD = 1, 2
PART = slice(HEAD * HEAD_DIM, (HEAD + 1) * HEAD_DIM)
EXTRACTIONS = ["mean_difference", "causal_mediation"]


class TaskToy(Toy):
    """Head (1, 2) writes the task at the last token, where most demonstrations are right; with it the model answers
    y3 to x3, without it repeats x3. `planted` False: the head hears nothing."""

    def __init__(self, *, planted: bool = True) -> None:
        super().__init__()
        self.planted = planted
        self.task = 4 * unit("task", width=HEAD_DIM)
        self.direction = self.w_o[LAYER][:, PART] @ self.task

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        # The arrow is the same wherever it stands.
        return 0.3 * super().embed(ids)

    def heads(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        out = torch.stack([0.2 * noise("h", layer, tuple(ids[:n + 1]), width=NUM_HEADS * HEAD_DIM)
                           for n in range(len(ids))])
        words = self.said(ids)
        shown = [(words[i - 1], words[i + 1]) for i, word in enumerate(words[:-1]) if word == "->"]
        right = 2 * sum(x[1:] == y[1:] for x, y in shown) > len(shown)
        if layer == LAYER and self.planted:
            out[-1, PART] += right * self.task
        return out

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(VOCAB, dtype=torch.float64)
        query = self.said(ids)[-2]
        strength = float(resid @ self.direction / self.direction.norm() ** 2)
        logits[self.token(query)] = 6.0
        logits[self.token(f"y{query[1:]}")] = 12.0 * strength
        return logits


def pairs(count: int = 40) -> list[dict[str, Any]]:
    return [{"input": f"x{n}", "output": f"y{n}"} for n in range(count)]


def extract(toy: Toy, **fields: Any) -> Extraction:
    given = {"name": "fv", "pairs": pairs(), "strengths": [0.5, 1.0], "num_prompts": 12, "shots": 4, "num_shuffled": 6,
             "num_heads": 1, "layers": [0, 1, 2], "max_eval": 8, **fields}
    return prepare("function_vector", parse_request("function_vector", given), toy, "test").run(silent, never)


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_the_planted_task_is_found_and_steers(extraction: str) -> None:
    toy = TaskToy()
    found = extract(toy, extraction=extraction)
    assert found.report["best_layer"] in (1, 2) or extraction == "causal_mediation"
    for layer in (1, 2):
        assert cosine(found.payload.layers[layer]["vector"], toy.direction) > 0.9
    test = found.report["test"]
    assert test["zero_shot"] == 0.0
    assert test["few_shot"] == test["steered"] == 1.0
    for control in found.report["controls"].values():
        assert control["draws"] == 20
        # One head spans eight dims: a draw within it may come near by chance.
        assert control["percentile"] >= 90
    assert found.metadata.kind == "vector" and found.metadata.op == "add"
    assert found.metadata.card is not None
    assert found.metadata.scope == NEXT


def test_few_items_say_which_of_many_layers_are_tried_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = extract(TaskToy())
    monkeypatch.setattr(function_vector, "MOST_POINTS", 4)
    narrowed = extract(TaskToy())
    assert set(everything.report["dev"]) == {"0", "1", "2"} and set(narrowed.report["dev"]) < {"0", "1", "2"}
    for name in ("best_layer", "best_strength", "test"):
        assert narrowed.report[name] == everything.report[name]


def test_a_task_that_nothing_steers_to_ends_as_a_draft() -> None:
    made, control = extract(TaskToy(planted=False)), extract(TaskToy())
    assert "random ones of equal size" in (made.metadata.card or {})["draft"]
    assert "draft" not in (control.metadata.card or {})


def test_the_causal_head_is_the_planted_one() -> None:
    found = extract(TaskToy(), extraction="causal_mediation", num_heads=3)
    ranked = found.report["heads"]
    assert (ranked[0]["layer"], ranked[0]["head"]) == (LAYER, HEAD)
    assert ranked[0]["effect"] > 10 * max(abs(ranked[1]["effect"]), 1e-6)


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_a_head_that_hears_nothing_gives_nothing(extraction: str) -> None:
    toy = TaskToy(planted=False)
    found = extract(toy, extraction=extraction)
    assert abs(cosine(found.payload.layers[2]["vector"], toy.direction)) < 0.6
    assert found.report["test"]["steered"] < 0.3


@pytest.mark.parametrize("extraction", EXTRACTIONS)
def test_another_tasks_vector_is_a_control(extraction: str) -> None:
    # Pairs that are not the planted task: their demonstrations leave the head silent.
    other = [{"input": f"x{n}", "output": f"y{n + 1}"} for n in range(40)]
    found = extract(TaskToy(), extraction=extraction, other_pairs=other)
    assert found.report["controls"]["other_task"]["accuracy"] < 0.5 < found.report["test"]["steered"]
    with pytest.raises(TooFewExamples) as caught:
        extract(TaskToy(), extraction=extraction, other_pairs=other[:4])
    assert caught.value.param == "other_pairs"


def test_the_projection_is_measured_and_not_read_from_weights() -> None:
    class Normed(TaskToy):
        """attn_out behind a norm: no linear function of the heads."""

        def forward(self, ids: Any, program: Any, prompt_length: int, seen: Any) -> torch.Tensor:
            logits = super().forward(ids, program, prompt_length, seen)
            for layer in range(3):
                seen["attn_out", layer] = torch.nn.functional.normalize(seen["attn_out", layer], dim=-1)
            return logits

    with pytest.raises(UnsupportedModel) as caught:
        extract(Normed(), extraction="causal_mediation")
    assert caught.value.param == "extraction"


@pytest.mark.parametrize(("given", "error", "param"), [
    ([*pairs(), {"input": " ", "output": "y"}], EmptyText, "pairs[40].input"),
    ([*pairs(), {"input": "x", "output": ""}], EmptyText, "pairs[40].output"),
    ([*pairs(), {"input": "a " * 300, "output": "y"}], TextTooLong, "pairs[40].input"),
    (pairs(8), TooFewExamples, "pairs"),
    ([{**pair, "output": "same"} for pair in pairs()], NoContrast, "pairs"),
    ([{**pair, "split": ("train", "dev", "test")[n % 3]} for n, pair in enumerate([*pairs(), pairs()[0]])],
     LeakingSplit, "pairs[40]"),
    ([*({**p, "split": ("train", "dev", "test")[n % 3]} for n, p in enumerate(pairs())),
      {"input": "x0", "output": "other", "split": "test"}], LeakingSplit, "pairs[40].split"),
])
def test_bad_pairs_are_refused(given: list[dict[str, Any]], error: type[TrimtabError], param: str) -> None:
    with pytest.raises(error) as caught:
        extract(TaskToy(), pairs=given)
    assert caught.value.param == param


def test_equal_requests_give_equal_artifacts_and_batches_are_bounded() -> None:
    toy = TaskToy()
    one, two = extract(toy), extract(toy)
    assert one.metadata == two.metadata
    assert toy.largest_batch <= 4096


@pytest.mark.parametrize("asked", [1, 4, 30])
def test_it_can_be_cancelled(asked: int) -> None:
    answers = iter([False] * asked + [True])
    with pytest.raises(ExtractionCancelled):
        request = parse_request("function_vector", {"name": "fv", "pairs": pairs()})
        prepare("function_vector", request, TaskToy(), "test").run(silent, lambda: next(answers))


def test_progress_never_falls() -> None:
    seen: list[float] = []
    request = parse_request("function_vector", {"name": "fv", "pairs": pairs(), "layers": [1], "strengths": [1.0],
                                                "num_prompts": 4, "max_eval": 5})
    prepare("function_vector", request, TaskToy(), "test").run(lambda share, _: seen.append(share), never)
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_answers_whose_first_tokens_do_not_tell_them_apart_are_refused() -> None:
    # What a tokenizer that spells unknown words in pieces makes of every answer.
    spelled = [{"input": f"x{n}", "output": f"un y{n}"} for n in range(30)]
    with pytest.raises(NoContrast, match="begin with the same token") as caught:
        extract(TaskToy(), pairs=spelled)
    assert caught.value.param == "pairs"


def test_answers_of_several_tokens_can_be_left_out() -> None:
    spelled = [{"input": f"z{n}", "output": f"un y{n}"} for n in range(50)]
    found = extract(TaskToy(), pairs=[*pairs(), *spelled], single_token=True)
    assert found.report["pairs_left_out"] == 50
    assert sum(found.report["pairs"].values()) == 40
    assert found.report["test"]["steered"] == 1.0
    with pytest.raises(TooFewExamples):
        extract(TaskToy(), pairs=spelled, single_token=True)


class Markless(TaskToy):
    """Its tokenizer puts no mark at the beginning."""

    def encode(self, prompt: Prompt) -> Tokens:
        return self.encode_continuation(prompt) if isinstance(prompt, str) else super().encode(prompt)


@pytest.mark.parametrize(("toy", "template", "warned"), [
    (Markless, "{x} ->", True), (Markless, "so {x} ->", False), (TaskToy, "{x} ->", False)])
def test_a_word_that_is_the_first_token_of_all_is_warned_of(toy: type[TaskToy], template: str, warned: bool) -> None:
    found = extract(toy(), template=template)
    assert ("warnings" in found.report) == warned
    assert ("warnings" in (found.metadata.card or {})) == warned
