"""Emotions: a situation that never names the emotion, then "She felt ..." and what she did.

Eight emotions and, for every situation, a neutral twin of the same people and form ("calm").
An item is (event, option, name, setting); held-out items never occur in training, nor do their
twins.

A right intervention changes the word after "felt" (and the reaction that follows it): the single
tokens of `EMOTIONS`, with `NEUTRAL` for the twins.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lab.corpus.emotion_tables import EVENTS, NEUTRAL, REACTIONS, SETTINGS
from lab.corpus.sample import Sample, TestItem, answer, capital, held_out, pick
from lab.corpus.words import NAMES, PRONOUNS

SKILL = "emotions"
EMOTIONS = tuple(EVENTS)


@dataclass(frozen=True)
class Situation:
    """One underlying item; `text(moving)` gives the moving form or its neutral twin."""

    emotion: str
    event: int
    option: int
    name: str
    setting: str

    @property
    def key(self) -> str:
        return f"emotions:{self.emotion}:{self.event}:{self.option}:{self.name}:{self.setting}"

    def text(self, moving: bool) -> str:
        template, hot, cold = EVENTS[self.emotion][self.event]
        x = (hot if moving else cold)[self.option]
        she, her = PRONOUNS[self.name]
        said = template.replace("{x}", x).format(n=self.name, p=she, q=her)
        return f"{capital(said)} {self.setting}. {capital(she)} felt"

    def reaction(self, rng: random.Random, moving: bool) -> str:
        she, her = PRONOUNS[self.name]
        return pick(rng, REACTIONS[self.word(moving)]).format(P=capital(she), q=her)

    def word(self, moving: bool) -> str:
        return self.emotion if moving else NEUTRAL


def draw(rng: random.Random, test: bool, emotion: str | None = None) -> Situation:
    """A situation of the wanted side of the split."""
    while True:
        kind = emotion or pick(rng, EMOTIONS)
        event = rng.randrange(len(EVENTS[kind]))
        option = rng.randrange(len(EVENTS[kind][event][1]))
        one = Situation(kind, event, option, pick(rng, NAMES), pick(rng, SETTINGS))
        if held_out(one.key) is test:
            return one


def train_sample(rng: random.Random) -> Sample:
    """One or two situations (two in three moving), each with its word and a reaction."""
    parts, keys = [], []
    for _ in range(rng.randint(1, 2)):
        one = draw(rng, test=False)
        moving = rng.random() < 0.67
        parts.append(one.text(moving) + answer(f" {one.word(moving)}.") + " "
                     + one.reaction(rng, moving))
        keys.append(one.key)
    return Sample(SKILL, tuple(keys), " ".join(parts))


def test_items(n: int, seed: int = 0) -> list[TestItem]:
    """Held-out situations, two in three moving; the answer is the next token."""
    rng = random.Random(f"emotions test {seed}")
    out = []
    for i in range(n):
        one = draw(rng, True, EMOTIONS[i % len(EMOTIONS)])
        moving = i % 3 != 2
        out.append(TestItem(SKILL, one.key, one.text(moving), " " + one.word(moving),
                            one.word(moving)))
    return out


def emotion_of(text: str) -> str | None:
    """The first emotion word (or the neutral one) of a continuation, or None."""
    for word in text.replace(".", " ").replace(",", " ").split():
        if word in EVENTS or word == NEUTRAL:
            return word
    return None
