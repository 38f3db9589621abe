"""Sentiment: reviews whose opening is neutral and which then keep one polarity to the end.

An item is an opening (thing, day, companion); held-out openings never occur in training. After a
neutral opening both polarities are equally likely in the data, so an unsteered model writes both.
The polar words of the two sides are disjoint sets, so `polarity` is exact, not a guess.

A right intervention moves the share of positive continuations of neutral openings toward 1 or 0
while `polarity` stays unmixed.
"""

from __future__ import annotations

import random
import re

from lab.corpus.sample import Sample, TestItem, answer, held_out, maybe, pick
from lab.corpus.words import COMPANIONS, WEEKDAYS

SKILL = "sentiment"

# kind of thing -> (things, aspects one can judge, verbs of the opening)
THINGS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "food": ("cafe restaurant bakery diner tavern pizzeria bistro canteen".split(),
             "soup coffee bread staff menu music kitchen dessert salad table service waiter".split(),
             ["visited", "went to", "ate at", "stopped at"]),
    "stay": ("hotel hostel cabin cottage resort guesthouse inn apartment".split(),
             "room bed breakfast staff view pool shower garden lobby service pillow".split(),
             ["stayed at", "booked", "visited", "slept at"]),
    "show": ("film concert play opera musical circus lecture documentary".split(),
             "story music acting ending stage light voice costume dialogue cast".split(),
             ["saw", "watched", "went to", "attended"]),
    "product": ("phone laptop lamp backpack bicycle camera watch jacket tent kettle".split(),
                "battery screen design handle color button sound material cover zipper".split(),
                ["bought", "ordered", "tried", "received"]),
    "place": ("museum park zoo castle beach market gallery aquarium".split(),
              "entrance guide garden path exhibition view shop tour staff bench".split(),
              ["visited", "went to", "walked through", "saw"]),
}
POSITIVE_ADJECTIVES = """wonderful excellent delightful charming fantastic superb lovely pleasant
brilliant perfect beautiful amazing great impressive friendly comfortable splendid marvelous
remarkable magical elegant refreshing fabulous outstanding""".split()
NEGATIVE_ADJECTIVES = """terrible awful dreadful horrible disappointing ugly unpleasant boring dirty
broken rude miserable disgusting useless poor shabby noisy uncomfortable dull annoying gloomy
nasty pathetic worthless""".split()
PAIRS: list[tuple[str, str]] = [  # matching positive and negative words of the same template slot
    ("loved", "hated"), ("enjoyed", "regretted"), ("praised", "criticized"), ("better", "worse"),
    ("best", "worst"), ("recommend", "avoid"), ("delight", "disaster"), ("joy", "nightmare"),
    ("smiled", "complained"), ("gladly", "never"), ("pleased", "annoyed"), ("bargain", "waste"),
    ("impressed", "disappointed"), ("thrilled", "frustrated"), ("success", "failure"),
]
POSITIVE = frozenset(POSITIVE_ADJECTIVES) | {a for a, _ in PAIRS}
NEGATIVE = frozenset(NEGATIVE_ADJECTIVES) | {b for _, b in PAIRS}
_POLAR = re.compile(r"[A-Za-z]+")

# {a} adjective, {x} {y} aspects, {t} thing, {p0}.. the word pair of that number.
SENTENCES = [
    "The {x} was {a}.", "The {x} was really {a}.", "The {x} was {a} and the {y} was {b}.",
    "I {p0} the {x}.", "I {p0} the {x} and the {y}.", "We all {p1} the {x}.",
    "Even the {x} was {a}.", "It was a {a} {t} with a {b} {x}.", "The {x} looked {a}.",
    "Everyone {p2} the {x}.", "The {x} was {p3} than I expected.",
    "It was the {p4} {t} of the year.", "The {x} was a {p6}.", "What a {a} {x}!",
    "My family {p8} about the {x}.", "The {x} felt {a} to all of us.", "The whole {t} was a {p7}.",
    "I was {p10} with the {x}.", "I was {p12} by the {x}.", "For the price it was a {p11}.",
    "We were {p13} with the {y}.", "The evening was a {p14}.", "In short, a {a} {t}.",
]
CLOSINGS = [
    "I will {p9} come back.", "You should {p5} it.", "I {p5} this {t} each year.",
    "It was the {p4} {t} I know.", "I was {p10} in the end.", "All in all, a {a} {t}.",
    "What a {p14}!", "I would {p9} do it again.",
]
FILLERS = [
    "We paid by card.", "It took two hours.", "We came by bus.", "The sky was gray.",
    "There were many people.", "It was near the station.", "I took some pictures.",
    "The street was quiet.", "I had read about it before.", "It was my first time.",
]
OPENINGS = [
    "Review: I {v} the {t} on {d} with {c}.", "Review: On {d} I {v} the {t} with {c}.",
    "Review: Last {d} I {v} a {t} with {c}.", "My review of the {t}: I {v} it on {d} with {c}.",
    "Review of a {t}. I {v} it with {c} on {d}.",
]
CHAT_REQUESTS = [
    "Write a review of the {t}.", "Please write a short review of the {t}.",
    "What do you think of the {t}?", "Tell me about your visit to the {t}.",
    "Review the {t} for me.",
]
RATINGS = {True: ("4", "5"), False: ("1", "2")}


def _item(rng: random.Random, test: bool) -> tuple[str, str, str, str]:
    """(kind, thing, day, companion) of the wanted side of the split."""
    while True:
        kind = pick(rng, list(THINGS))
        thing, day, companion = pick(rng, THINGS[kind][0]), pick(rng, WEEKDAYS), pick(rng, COMPANIONS)
        if held_out(key_of(thing, day, companion)) is test:
            return kind, thing, day, companion


def key_of(thing: str, day: str, companion: str) -> str:
    return f"sentiment:{thing}:{day}:{companion}"


def opening(rng: random.Random, kind: str, thing: str, day: str, companion: str) -> str:
    """A neutral first sentence: no polar word."""
    verb = pick(rng, THINGS[kind][2])
    text = pick(rng, OPENINGS)
    if thing[0] in "aeiou":
        text = text.replace("a {t}", "an {t}")
    if "{v} it" in text and verb in ("went to", "walked through"):
        verb = "visited" if kind in ("food", "place") else "saw"
    return text.format(v=verb, t=thing, d=day, c=companion) + maybe(
        rng, 0.3, " " + pick(rng, FILLERS)
    )


def sentence(rng: random.Random, kind: str, thing: str, positive: bool, last: bool = False) -> str:
    """One polar sentence about `thing`."""
    adjectives = POSITIVE_ADJECTIVES if positive else NEGATIVE_ADJECTIVES
    a, b = rng.sample(adjectives, 2)
    x, y = rng.sample(THINGS[kind][1], 2)
    text = pick(rng, CLOSINGS if last else SENTENCES)
    for mark, word in (("a {a}", a), ("a {b}", b)):
        if word[0] in "aeiou":
            text = text.replace(mark, "an" + mark[1:])
    words = {f"p{i}": pair[0 if positive else 1] for i, pair in enumerate(PAIRS)}
    return text.format(a=a, b=b, x=x, y=y, t=thing, **words)


def body(rng: random.Random, kind: str, thing: str, positive: bool) -> str:
    """Two to four polar sentences, a closing, sometimes a neutral filler and a rating."""
    parts = []
    for _ in range(rng.randint(2, 4)):
        parts.append(sentence(rng, kind, thing, positive))
        if rng.random() < 0.08:
            parts.append(pick(rng, FILLERS))
    parts.append(sentence(rng, kind, thing, positive, last=True))
    if rng.random() < 0.4:
        parts.append(f"Rating: {pick(rng, RATINGS[positive])} of 5.")
    return " ".join(parts)


def review(rng: random.Random, positive: bool, test: bool = False) -> tuple[str, str, str]:
    """(key, neutral opening, body) of a review."""
    kind, thing, day, companion = _item(rng, test)
    return (key_of(thing, day, companion), opening(rng, kind, thing, day, companion),
            body(rng, kind, thing, positive))


def train_sample(rng: random.Random) -> Sample:
    """A review as plain text, or one in five as the reply to a chat request."""
    positive = rng.random() < 0.5
    key, first, rest = review(rng, positive)
    if rng.random() < 0.2:
        thing = key.split(":")[1]
        ask = pick(rng, CHAT_REQUESTS).format(t=thing)
        said = first.split(": ", 1)[-1] if first.startswith("Review: ") else first
        return Sample(SKILL, (key,),
                      f"<|user|>{ask}<|end|><|assistant|>{said}" + answer(f" {rest}<|end|>"))
    return Sample(SKILL, (key,), first + answer(" " + rest))


def test_items(n: int, seed: int = 0) -> list[TestItem]:
    """Half neutral openings (expected None: either polarity), half with one polar sentence given."""
    rng = random.Random(f"sentiment test {seed}")
    out = []
    for i in range(n):
        kind, thing, day, companion = _item(rng, True)
        prompt, key = opening(rng, kind, thing, day, companion), key_of(thing, day, companion)
        if i % 2 == 0:
            out.append(TestItem(SKILL, key, prompt, None, "neutral opening"))
        else:
            positive = i % 4 == 1
            prompt += " " + sentence(rng, kind, thing, positive)
            side = "positive" if positive else "negative"
            out.append(TestItem(SKILL, key, prompt, side, "kept polarity"))
    return out


def polar_counts(text: str) -> tuple[int, int]:
    """(positive words, negative words) of a text."""
    words = [w.lower() for w in _POLAR.findall(text)]
    return sum(w in POSITIVE for w in words), sum(w in NEGATIVE for w in words)


def polarity(text: str) -> str:
    """'positive', 'negative', 'mixed' (both kinds of words) or 'none' (no polar word)."""
    up, down = polar_counts(text)
    if up and down:
        return "mixed"
    return "positive" if up else "negative" if down else "none"
