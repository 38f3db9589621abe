"""Calendar: "three days after Monday is Thursday", for two cycles and two sequences.

Weekdays and months go round; letters and number words do not. Every (start, step) pair occurs in
training, but inside other contexts: an item is (pair, name, occasion), and held-out contexts
(name, occasion) never occur in training at all. Tests cover every pair inside held-out contexts.

A right intervention that swaps the start swaps the answer with it: `shifted` gives the truth.
"""

from __future__ import annotations

import random

from lab.corpus.sample import Sample, TestItem, answer, capital, held_out, maybe, pick
from lab.corpus.words import LETTERS, MONTHS, NAMES, NUMBERS, WEEKDAYS

SKILL = "calendar"
SERIES: dict[str, list[str]] = {
    "weekdays": WEEKDAYS, "months": MONTHS, "letters": LETTERS, "numbers": NUMBERS,
}
CYCLES = ("weekdays", "months")
UNITS = {"weekdays": "day", "months": "month", "letters": "letter", "numbers": "number"}
REACH = {"weekdays": 7, "months": 6, "letters": 5, "numbers": 6}  # largest step either way

OCCASIONS = """party trip meeting picnic wedding concert game exhibition lesson exam dinner race
market visit parade auction rehearsal interview festival workshop sale reunion debate play""".split()
FILLERS = [
    "{n} wrote it on a card.", "{n} was not sure about it.", "The {o} was near.",
    "{n} asked about the {o}.", "{n} talked with {m} about the {o}.", "{n} likes the {o}.",
    "It was for the {o}.", "{n} had to plan the {o}.", "{m} forgot the {o}.",
]
WHOLE_CONTEXTS = [f for f in FILLERS if "{n}" in f and "{o}" in f]
# {k} steps, {u} unit in the right number, {w} after/before, {s} start; the answer follows.
PLAIN = [
    "{K} {u} {w} {s} is", "What comes {k} {u} {w} {s}? It is", "The {b} that is {k} {u} {w} {s} is",
    "{n} counts: {k} {u} {w} {s} is", "{n} asks {m}: what is {k} {u} {w} {s}? {m} says:",
]
DATED = [  # for weekdays and months
    "The {o} is in {s}. The {p} is {k} {u} {l}. So the {p} is in",
    "{n} planned the {o} for {s}. It was moved and took place {k} {u} {l}, in",
    "If the {o} is in {s}, then {k} {u} {l} it will be",
]
CHAT = [
    "What is {k} {u} {w} {s}?", "Which {b} is {k} {u} {w} {s}?", "What {b} is {k} {u} {w} {s}?",
    "Tell me what comes {k} {u} {w} {s}.",
]


def pairs(series: str) -> list[tuple[str, int]]:
    """Every (start, step) with a defined answer; negative steps mean "before"."""
    names, reach = SERIES[series], REACH[series]
    steps = [k for k in range(-reach, reach + 1) if k]
    return [(s, k) for i, s in enumerate(names) for k in steps
            if series in CYCLES or 0 <= i + k < len(names)]


def shifted(series: str, start: str, step: int) -> str:
    """The ground truth: `step` places after (or before) `start`."""
    names = SERIES[series]
    at = names.index(start) + step
    if series not in CYCLES and not 0 <= at < len(names):
        raise ValueError(f"{step} from {start} leaves the {series}")
    return names[at % len(names)]


def _context(rng: random.Random, test: bool) -> tuple[str, str]:
    """(name, occasion) of the wanted side."""
    while True:
        name, occasion = pick(rng, NAMES), pick(rng, OCCASIONS)
        if held_out(context_key(name, occasion)) is test:
            return name, occasion


def context_key(name: str, occasion: str) -> str:
    return f"calendar:{name}:{occasion}"


def prompt(rng: random.Random, series: str, start: str, step: int, name: str, occasion: str,
           told: bool = False, dated: bool = False) -> str:
    """A question about one pair; what is right to follow is a space and the answer. `told` puts a
    sentence before it that names both the person and the occasion; `dated` asks for a date."""
    other = pick(rng, NAMES)
    second = pick(rng, [o for o in OCCASIONS if o != occasion])
    unit = UNITS[series] + ("s" if abs(step) > 1 else "")
    k = NUMBERS[abs(step) - 1]
    words = dict(
        n=name, m=other, o=occasion, p=second, k=k, K=capital(k), u=unit, b=UNITS[series], s=start,
        w="after" if step > 0 else "before", l="later" if step > 0 else "earlier",
    )
    dated = dated or (series in CYCLES and rng.random() < 0.35)
    text = pick(rng, DATED if dated else PLAIN)
    if series == "weekdays":
        text = text.replace(" in {s}", " on {s}").replace("is in", "is on").replace(", in", ", on")
    lead = pick(rng, WHOLE_CONTEXTS) + " " if told else maybe(rng, 0.6, pick(rng, FILLERS) + " ")
    return (lead + text).format(**words)


def chat_prompt(rng: random.Random, series: str, start: str, step: int) -> tuple[str, str]:
    """(question turn, beginning of the reply) of the same question as a conversation."""
    unit = UNITS[series] + ("s" if abs(step) > 1 else "")
    words = dict(k=NUMBERS[abs(step) - 1], u=unit, b=UNITS[series], s=start,
                 w="after" if step > 0 else "before")
    question = pick(rng, CHAT).format(**words)
    begin = capital("{k} {u} {w} {s} is".format(**words))
    return f"<|user|>{question}<|end|><|assistant|>", begin


_PAIRS = {series: pairs(series) for series in SERIES}


def train_sample(rng: random.Random) -> Sample:
    """One to three questions of one series in one context."""
    series = pick(rng, list(SERIES))
    name, occasion = _context(rng, test=False)
    key = context_key(name, occasion)
    if rng.random() < 0.12:
        start, step = pick(rng, _PAIRS[series])
        ask, begin = chat_prompt(rng, series, start, step)
        text = ask + begin + answer(f" {shifted(series, start, step)}.<|end|>")
        return Sample(SKILL, (f"calendar:chat:{series}:{start}:{step}",), text)
    parts = []
    for _ in range(rng.randint(1, 3)):
        start, step = pick(rng, _PAIRS[series])
        parts.append(prompt(rng, series, start, step, name, occasion)
                     + answer(f" {shifted(series, start, step)}.") )
    return Sample(SKILL, (key,), " ".join(parts))


def dates_sample(rng: random.Random) -> Sample:
    """Only dates by weekday: what a small model learns last, as other skills end sentences with
    "on" and any weekday."""
    name, occasion = _context(rng, test=False)
    parts = []
    for _ in range(rng.randint(1, 3)):
        start, step = pick(rng, _PAIRS["weekdays"])
        parts.append(prompt(rng, "weekdays", start, step, name, occasion, dated=True)
                     + answer(f" {shifted('weekdays', start, step)}."))
    return Sample(SKILL, (context_key(name, occasion),), " ".join(parts))


def test_items(n: int = 0, seed: int = 0) -> list[TestItem]:
    """Every pair of every series once (n = 0), or an even sample of n, in held-out contexts."""
    rng = random.Random(f"calendar test {seed}")
    out = []
    for series in SERIES:
        for start, step in _PAIRS[series]:
            name, occasion = _context(rng, test=True)
            text = prompt(rng, series, start, step, name, occasion, told=True)
            out.append(TestItem(SKILL, context_key(name, occasion), text,
                                " " + shifted(series, start, step), series,
                                {"start": start, "step": step}))
    if 0 < n < len(out):
        return rng.sample(out, n)
    return out


def names_answer(text: str, series: str) -> str | None:
    """The first member of the series in a continuation, or None."""
    for word in text.replace(".", " ").replace(",", " ").replace("?", " ").split():
        if word in SERIES[series]:
            return word
    return None
