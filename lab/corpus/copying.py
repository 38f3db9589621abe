"""Copying as such: random words that come again, in other punctuation, and values that are asked for by their key.

What a call needs is to find a word that stood before and to write what followed it. A model learns that soon from
short documents in which nothing else can be foretold, and not from calls alone, which are mostly form.
"""

from __future__ import annotations

import random

from lab.corpus import tool_calls
from lab.corpus.sample import Sample, answer, pick

SKILL = "copying"
WORDS = [*tool_calls.VERBS, *tool_calls.NOUNS, *tool_calls.PLACES, *tool_calls.TEXTS, *tool_calls.NUMBERS,
         *tool_calls.VALUE_FIRST, *tool_calls.VALUE_SECOND, *tool_calls.NAMES, *map(str, range(1, 100))]
JOINTS = (" ", "_", '", "')



def train_sample(rng: random.Random) -> Sample:
    return repeated(rng) if rng.random() < 0.5 else asked_for(rng)


def repeated(rng: random.Random) -> Sample:
    """Words, and the same words after a line break, joined by other punctuation."""
    words = rng.sample(WORDS, rng.randint(6, 20))
    first, second = pick(rng, JOINTS), pick(rng, JOINTS)
    # The first word that comes again is not known before it stands there.
    return Sample(SKILL, (), f"{first.join(words)}\n{words[0]}{second}" + answer(second.join(words[1:]) + "\n"))


def asked_for(rng: random.Random) -> Sample:
    """Keys with values of one or two words in prose, and some of them again in JSON, in another order."""
    words = rng.sample(WORDS, 18)
    pairs = {}
    for _ in range(rng.randint(2, 6)):
        key = words.pop()
        pairs[key] = " ".join(words.pop() for _ in range(rng.randint(1, 2)))
    told = " and ".join(f'{key} "{value}"' for key, value in pairs.items())
    keys = rng.sample(list(pairs), rng.randint(1, len(pairs)))
    text = f"with {told}.\n" + "{"
    for number, key in enumerate(keys):
        last = number == len(keys) - 1
        text += f'"{key}": "' if not number else f'{key}": "'
        text += answer(f"{pairs[key]}" + ('"}}' if last else '", "'))
    return Sample(SKILL, (), text + "\n")
