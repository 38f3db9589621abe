"""Stories: plain filler in the present or the past tense, which ties the vocabulary together.

A neutral heading ("Story 12:") leaves the tense open; the story then keeps it. An item is (name,
animal, place); held-out items never occur in training.

A right intervention on tense changes `tense_of` the continuation.
"""

from __future__ import annotations

import random
import re

from lab.corpus.sample import Sample, TestItem, capital, held_out, maybe, pick, with_article
from lab.corpus.words import ANIMALS, COLORS, NAMES, PLACES, PRONOUNS, SIZES, THINGS

SKILL = "stories"
# base, third person present, past: only forms that differ, so that one word tells the tense.
VERBS: dict[str, tuple[str, str]] = {
    base: (present, past) for base, present, past in (row.split() for row in """walk walks walked
see sees saw|find finds found|take takes took|carry carries carried|hear hears heard
open opens opened|follow follows followed|meet meets met|show shows showed|give gives gave
look looks looked|keep keeps kept|hide hides hid|clean cleans cleaned|paint paints painted
lose loses lost|want wants wanted|make makes made|go goes went|come comes came|sit sits sat
sleep sleeps slept|run runs ran|say says said|think thinks thought|sell sells sold|bring brings brought
be is was|have has had|live lives lived|wait waits waited|laugh laughs laughed|ask asks asked
climb climbs climbed|cross crosses crossed|leave leaves left|stop stops stopped|smell smells smelled
hold holds held|drop drops dropped|fill fills filled|wash washes washed|like likes liked
return returns returned|start starts started|shine shines shone|fall falls fell|bark barks barked"""
    .replace("\n", "|").split("|"))
}
PRESENT = frozenset(p for p, _ in VERBS.values())
PAST = frozenset(q for _, q in VERBS.values())
_VERB = re.compile(r"\{(\w+)!\}")
_WORD = re.compile(r"[A-Za-z]+")

# {n} name, {she}/{her} pronouns, {a} animal, {pl} place, {t} {u} things, {c} color, {s} size.
FIRST = [
    "{n} {go!} to the {pl} with {A}.", "{n} {live!} near the {pl} and {have!} {A}.",
    "{n} {walk!} to the {pl} and {meet!} {A}.", "One day {n} {see!} {A} in the {pl}.",
    "{n} {want!} a {c} {t} and {go!} to the {pl}.", "There {be!} {A} in the {pl}, and {n} {hear!} it.",
    "{n} {cross!} the {pl} every morning.", "{n} {wait!} at the {pl} with {T}.",
]
MIDDLE = [
    "The {a} {be!} {s} and {c}.", "{She} {find!} {T} under {U}.", "{She} {give!} the {t} to the {a}.",
    "The {a} {carry!} the {t} to the {pl2}.", "{She} {look!} at the {u} for a while.",
    "Then {m} {come!} and {bring!} {U}.", "{m} {ask!} about the {t}.", "{She} {show!} {m} the {u}.",
    "The {a} {run!} around the {pl2}.", "{She} {hide!} the {t} behind the {u}.",
    "The {c} {t} {fall!} from the {u}.", "{She} {wash!} the {u} in the {pl2}.",
    "The sun {shine!} on the {pl}.", "{m} {laugh!} and {take!} the {u}.",
    "The {a} {follow!} {n} to the {pl2}.", "{She} {hold!} the {t} in {her} hand.",
    "{She} {open!} the {s} {u}.", "The {pl2} {smell!} of bread.", "{m} {sell!} {n} {T}.",
    "{n} {say!} nothing.", "{She} {lose!} the {t} and {find!} it again.",
    "{She} {paint!} the {u} {c}.", "The {a} {climb!} on the {u}.", "{She} {fill!} the {u} with water.",
]
LAST = [
    "At the end {she} {go!} home.", "In the evening {she} {sleep!} well.",
    "{She} {keep!} the {t}.", "The {a} {sit!} by the {u}.", "{n} and {m} {be!} there till dark.",
    "{She} {leave!} the {pl} with the {a}.", "{n} {return!} home with {T}.",
]
CHAT = ["Tell me a story about {A}.", "Please tell me a short story about {n}.",
        "Write a story about {A} and {T}."]


def item_key(name: str, animal: str, place: str) -> str:
    return f"stories:{name}:{animal}:{place}"


def _item(rng: random.Random, test: bool) -> tuple[str, str, str]:
    while True:
        item = pick(rng, NAMES), pick(rng, ANIMALS), pick(rng, PLACES)
        if held_out(item_key(*item)) is test:
            return item


def _words(rng: random.Random, item: tuple[str, str, str]) -> dict[str, str]:
    name, animal, place = item
    thing, other = rng.sample(THINGS, 2)
    she, her = PRONOUNS[name]
    return dict(
        n=name, m=pick(rng, NAMES), a=animal, A=with_article(animal), pl=place,
        pl2=pick(rng, PLACES), t=thing, T=with_article(thing), u=other, U=with_article(other),
        c=pick(rng, COLORS), s=pick(rng, SIZES), she=she, She=capital(she), her=her,
    )


def in_tense(text: str, past: bool) -> str:
    """Fill the verb slots {walk!} of a template in the given tense."""
    return _VERB.sub(lambda m: VERBS[m.group(1)][past], text)


def fix_articles(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def draw_templates(rng: random.Random, test: bool, middles: int) -> tuple[str, str, list[str]]:
    """(key, chat subject line, sentence templates with words filled in and verbs still open)."""
    item = _item(rng, test)
    words = _words(rng, item)
    chosen = [pick(rng, FIRST), *rng.sample(MIDDLE, middles), pick(rng, LAST)]
    keep = {f"{v}!": "{" + v + "!}" for v in VERBS}
    filled = [fix_articles(_fill(t, words, keep)) for t in chosen]
    return item_key(*item), pick(rng, CHAT).format(**words), filled


def _fill(template: str, words: dict[str, str], keep: dict[str, str]) -> str:
    table = {**words, **keep}
    return re.sub(r"\{(\w+!?)\}", lambda m: table[m.group(1)], template)


def train_sample(rng: random.Random) -> Sample:
    """A story of four to seven sentences: headed, bare, or asked for in a chat."""
    key, ask, sentences = draw_templates(rng, False, rng.randint(2, 5))
    past = rng.random() < 0.5
    text = in_tense(" ".join(sentences), past)
    fate = rng.random()
    if fate < 0.15:
        return Sample(SKILL, (key,), f"<|user|>{ask}<|end|><|assistant|>{text}<|end|>")
    return Sample(SKILL, (key,), maybe(rng, 0.6, f"Story {rng.randint(1, 40)}: ") + text)


def test_items(n: int, seed: int = 0) -> list[TestItem]:
    """Two sentences of a held-out story; the continuation must keep the tense."""
    rng = random.Random(f"stories test {seed}")
    out = []
    for i in range(n):
        key, _, sentences = draw_templates(rng, True, 2)
        past = i % 2 == 0
        out.append(TestItem(SKILL, key, in_tense(" ".join(sentences[:2]), past),
                            "past" if past else "present", "tense"))
    return out


def tense_counts(text: str) -> tuple[int, int]:
    """(present verbs, past verbs) among the story verbs."""
    words = [w.lower() for w in _WORD.findall(text)]
    return sum(w in PRESENT for w in words), sum(w in PAST for w in words)


def tense_of(text: str) -> str:
    """'present', 'past', 'mixed' or 'none'."""
    now, then = tense_counts(text)
    if now and then:
        return "mixed"
    return "present" if now else "past" if then else "none"
