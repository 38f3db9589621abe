"""Bandit: a player pulls one of two arms, sees it pay or not, and chooses again.

The data's policy is known: with d = (wins - losses of A) - (wins - losses of B), arm A is chosen
with probability 1 / (1 + exp(-0.8 d)), kept inside [0.1, 0.9], so the player always explores with a
known probability. An item is (setting, history); held-out items never occur in training.

A right intervention (entropy steering) moves the entropy of the arm choice at a given history;
`policy` gives the unsteered truth.
"""

from __future__ import annotations

import math
import random

from lab.corpus.sample import Sample, TestItem, answer, held_out, pick

SKILL = "bandit"
ARMS = ("A", "B")
SLOPE, FLOOR = 0.8, 0.1
LONGEST = 8  # pulls of an episode
PAID = {True: "It pays.", False: "It fails."}
# setting -> (opening, what an arm is called); the arm letter follows "I choose <arm>".
SETTINGS: dict[str, tuple[str, str]] = {
    "casino": ("Two machines stand in the hall.", "machine"),
    "field": ("Two wells lie in the field.", "well"),
    "cellar": ("Two levers are on the wall.", "lever"),
    "forest": ("Two traps are in the forest.", "trap"),
    "shop": ("Two boxes are in the shop.", "box"),
    "lake": ("Two nets hang in the lake.", "net"),
}
History = tuple[tuple[str, bool], ...]


def policy(history: History) -> float:
    """The data's probability of choosing arm A next."""
    d = sum((1 if won else -1) * (1 if arm == "A" else -1) for arm, won in history)
    return min(1 - FLOOR, max(FLOOR, 1 / (1 + math.exp(-SLOPE * d))))


def entropy(history: History) -> float:
    """Entropy of the data's choice, in nats."""
    p = policy(history)
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def item_key(setting: str, history: History) -> str:
    return f"bandit:{setting}:" + "".join(arm + "+-"[not won] for arm, won in history)


def _is_test(setting: str, history: History) -> bool:
    """Short histories are too few to hold out; they are all trained."""
    return len(history) >= 3 and held_out(item_key(setting, history), 0.06)


def prompt(setting: str, history: History) -> str:
    """The episode so far; what follows is " A" or " B"."""
    opening, noun = SETTINGS[setting]
    lines = [opening, *(f"I choose {noun} {arm}. {PAID[won]}" for arm, won in history)]
    return " ".join([*lines, f"I choose {noun}"])


def episode(rng: random.Random, length: int) -> History:
    """Pulls drawn from the policy; each arm has its own chance of paying."""
    chance = {arm: rng.choice((0.2, 0.4, 0.6, 0.8)) for arm in ARMS}
    history: History = ()
    for _ in range(length):
        arm = "A" if rng.random() < policy(history) else "B"
        history = (*history, (arm, rng.random() < chance[arm]))
    return history


def train_sample(rng: random.Random) -> Sample:
    """A whole episode; no prefix of it is a held-out item."""
    setting = pick(rng, list(SETTINGS))
    while True:
        history = episode(rng, LONGEST)
        if not any(_is_test(setting, history[:i]) for i in range(LONGEST)):
            break
    keys = tuple(item_key(setting, history[:i]) for i in range(LONGEST))
    opening, noun = SETTINGS[setting]
    pulls = (f"I choose {noun}" + answer(f" {arm}") + f". {PAID[won]}" for arm, won in history)
    return Sample(SKILL, keys, " ".join([opening, *pulls]))


def test_items(n: int, seed: int = 0) -> list[TestItem]:
    """Different held-out histories; expected is the data's probability of arm A."""
    rng = random.Random(f"bandit test {seed}")
    out: dict[str, TestItem] = {}
    while len(out) < n:
        setting = pick(rng, list(SETTINGS))
        history = episode(rng, rng.randint(3, LONGEST - 1))
        if _is_test(setting, history):
            key = item_key(setting, history)
            out[key] = TestItem(SKILL, key, prompt(setting, history), policy(history), setting,
                                {"history": history})
    return list(out.values())


def chosen_arm(text: str) -> str | None:
    """The arm a continuation of a bandit prompt chooses, or None."""
    word = text.split(maxsplit=1)[0].rstrip(".") if text.split() else ""
    return word if word in ARMS else None
