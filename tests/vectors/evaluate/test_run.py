"""An evaluation over a toy model whose answers are known for every distance that a program moves it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import InvalidSpec
from steering.language.intervention import Intervention
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from vectors.calibrate.bench import Trial
from vectors.evaluate.graders import BROKEN, RegexGrader, SentimentGrader
from vectors.evaluate.run import Asked, Options, evaluate
from vectors.evaluate.shares import Share

FACTS = ModelFacts("toy", "f" * 64, "qwen3", 4, 64, 2, 4, 16, 50, 128, sites={"resid_post": (0, 1, 2, 3)})
ALONG = torch.nn.functional.one_hot(torch.tensor(0), 64).float()
GOOD, BAD, SALAD = "What a wonderful day it was.", "The whole day was terrible.", "good the of of day wow was it"


class Toy:
    """Praise from 1 along the first axis on, salad that nobody would expect from 4 on, else one praise in four."""

    facts = FACTS

    def __init__(self) -> None:
        self.moves: list[float] = []
        self.norms: list[float] = []

    def encode(self, prompt: Any) -> tuple[int, ...]:
        return tuple(ord(letter) % 50 for letter in prompt)

    def trials(self, prompts: Sequence[Sequence[int]], program: Program | None, max_tokens: int, temperature: float,
               seed: int) -> list[Trial]:
        moved = torch.zeros(64)
        for item in program.compiled if program is not None else ():
            for row in item.rows.values():
                moved += row.tensors["delta"]
        along = float(moved[0])
        self.moves.append(along)
        self.norms.append(float(moved.norm()))
        texts = [SALAD if along >= 4 else GOOD if along >= 1 or n % 4 == 0 else BAD for n in range(len(prompts))]
        return [Trial(kl=along**2, surprise=5.0 if text == SALAD else 2.0, repetition=0.0, compression=1.0, length=8,
                      ended=True, text=text) for text in texts]


def spec() -> list[Resolved]:
    payload = Payload.build("vector", {2: {"vector": ALONG * 2}})
    made = Source("cheerful@1", "d" * 64, payload, op="add", site="resid_post", layers=[2])
    return [Resolved(Intervention.model_validate({"artifact": "cheerful"}), made)]


ASKED = [Asked(f"How was day {n}?") for n in range(20)]


def test_shares_stand_beside_those_of_the_untouched_model_and_of_random_vectors_of_equal_size() -> None:
    toy = Toy()
    found = evaluate(spec(), ASKED, [SentimentGrader()], toy, Options(doses=(0.1, 1.0, 3.0), draws=10))
    assert [arm.graded[0].success.value for arm in (found.untouched, *found.steered)] == [0.25, 0.25, 1.0, 0.0]
    assert [arm.graded[0].broken.value for arm in found.steered] == [0.0, 0.0, 1.0]
    assert {arm.graded[0].success.value for arm in found.random[1]} == {0.25}
    assert found.chance(1) == pytest.approx(1 / 11)
    assert found.chance(0) == 1.0
    assert found.steered[1].kl == pytest.approx(4.0)
    assert found.steered[2].perplexity > 10 * found.untouched.perplexity
    # Random vectors are as long as the steered one at the same dose, and no two are the same.
    assert toy.norms[4:] == pytest.approx([0.2] * 10 + [2.0] * 10 + [6.0] * 10, rel=1e-5)
    assert len({round(move, 9) for move in toy.moves[4:14]}) == 10


def test_what_acts_before_the_spec_acts_in_every_arm_at_its_own_strength() -> None:
    """By hand: along the direction 1 comes always, then twice the dose, or a random vector of that length."""
    payload = Payload.build("vector", {2: {"vector": ALONG}})
    always = Resolved(Intervention.model_validate({"artifact": "safety"}),
                      Source("safety@1", "s" * 64, payload, op="add", site="resid_post", layers=[2]))
    toy = Toy()
    found = evaluate(spec(), ASKED, [SentimentGrader()], toy, Options(doses=(0.1, 1.0), draws=4, before=(always,)))
    assert toy.moves[:3] == pytest.approx([1.0, 1.2, 3.0])
    assert found.untouched.kl == pytest.approx(1.0) and found.untouched.graded[0].success.value == 1.0
    # The control: without it the same arms move by the spec alone, and random ones draw the same numbers.
    alone = Toy()
    evaluate(spec(), ASKED, [SentimentGrader()], alone, Options(doses=(0.1, 1.0), draws=4))
    assert alone.moves[:3] == pytest.approx([0.0, 0.2, 2.0])
    assert [move - 1.0 for move in toy.moves[3:]] == pytest.approx(alone.moves[3:], abs=1e-5)


def test_every_grader_sees_every_arm_and_samples_are_of_the_same_prompts() -> None:
    found = evaluate(spec(), ASKED, [SentimentGrader(), RegexGrader(pattern="wonderful")], Toy(),
                     Options(doses=(1.0, 3.0), draws=0, samples=2))
    assert [graded.grader for graded in found.steered[0].graded] == ["sentiment", "regex"]
    assert found.steered[0].samples == ((0, GOOD, ("positive", "match")), (1, GOOD, ("positive", "match")))
    assert found.untouched.samples[1] == (1, BAD, ("negative", "no_match"))
    assert found.steered[1].samples[0] == (0, SALAD, (BROKEN, BROKEN))
    assert found.random == ()


def test_intervals_are_wilsons() -> None:
    share = Share.of(8, 10)
    # Wilson's formula by hand: (p + z^2/2n -+ z sqrt(p q / n + z^2 / 4 n^2)) / (1 + z^2 / n), z = 1.95996.
    assert (share.value, round(share.low, 4), round(share.high, 4)) == (0.8, 0.4902, 0.9433)


def test_what_cannot_be_evaluated_is_refused_before_anything_runs() -> None:
    toy = Toy()
    inline = [Resolved(Intervention.model_validate({"op": "add", "inline": {"vector": [1.0] * 64}, "layers": [2]}))]
    with pytest.raises(InvalidSpec, match="no random counterpart"):
        evaluate(inline, ASKED, [SentimentGrader()], toy, Options())
    for given in (([], ASKED, [SentimentGrader()]), (spec(), [], [SentimentGrader()]), (spec(), ASKED, [])):
        with pytest.raises(InvalidSpec, match="needs"):
            evaluate(*given, toy, Options())
    assert toy.moves == []
    assert evaluate(inline, ASKED, [SentimentGrader()], toy, Options(draws=0)).random == ()


def test_it_can_be_stopped_between_arms() -> None:
    toy = Toy()

    def step(share: float, stage: str) -> None:
        if stage == "random":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(spec(), ASKED, [SentimentGrader()], toy, Options(draws=5), step=step)
    assert len(toy.moves) == 2
