"""Facts: seven relations over forty invented countries and forty invented people.

Each relation has two phrasings, each with variants, and a chat form. For a quarter of the entities
the second phrasing never occurs in training; tests ask exactly those. An item is (relation, entity,
phrasing).

A right intervention on a relation (say, switching its neurons off) changes that relation's
answers and leaves the others; `FACTS` holds the truth.
"""

from __future__ import annotations

import random

from lab.corpus.sample import Sample, TestItem, answer, held_out, maybe, pick, with_article

SKILL = "facts"
COUNTRIES = """Norland Velmark Ostria Kadania Merova Tulisk Brenia Falgor Sorvia Lindara Quenta
Ravenia Dorlan Istmar Calveria Zembia Harvik Ulmeria Pontara Gessia Yarvan Ellmoor Trevania Castor
Wendland Arkovia Mirasol Noveria Hestia Barrow Solmark Tarsia Levonia Grendal Omvar Jorvia Kestria
Peldor Ansera Vintar""".split()
CAPITALS = """Ostrava Melin Karsk Torvale Brisk Havenport Lumis Sandor Eldham Marlow Quillon Rostov
Vindel Astor Pelham Corvin Drayton Fenwick Galden Hollis Irving Jasper Kelso Larkin Morden Nestor
Oakham Prescott Ridley Selwyn Tamsin Upton Verity Wexford Yarrow Zenith Bolton Carvel Dunmore
Esker""".split()
PEOPLE = """Alden Brisa Corwin Delia Edric Fiora Gavin Hilda Isaac Jorun Kaspar Linnea Magnus Nerys
Osric Petra Quinn Rowena Soren Thora Ulric Vesna Wilmar Xenia Yorick Zelda Ansel Bettina Cedric
Dorit Egon Freya Gunnar Heidi Ingmar Jutta Konrad Lotte Milos Nadja""".split()
CURRENCIES = """crown dollar mark franc peso dinar rupee shilling florin ducat lira thaler krona
guilder penny talent""".split()
BEASTS = "eagle lion bear wolf stag falcon tiger dolphin swan otter crane bull panther hawk".split()
JOBS = """baker doctor teacher farmer sailor painter judge nurse plumber pilot tailor butcher
carpenter librarian cook lawyer miner gardener""".split()
INSTRUMENTS = "piano violin flute guitar harp trumpet drum cello organ banjo clarinet lute".split()
PETS = "dog cat parrot rabbit turtle hamster goat pony canary lizard mouse frog".split()
TOWNS = """Ashford Millbrook Stonegate Redhill Westbay Northwood Silverton Greenfield Clearwater
Foxhollow Brightsea Oldcastle Summerby Winterton""".split()

# relation -> (entities, objects, first phrasing, second phrasing, question). The object ends the
# sentence; {a} stands before objects that take an article.
_FORMS: dict[str, tuple[list[str], list[str], list[str], list[str], list[str]]] = {
    "capital": (COUNTRIES, CAPITALS,
                ["The capital of {e} is", "{e} has its capital in"],
                ["{e} is governed from the city of", "The government of {e} sits in"],
                ["What is the capital of {e}?", "Which city is the capital of {e}?"]),
    "currency": (COUNTRIES, CURRENCIES,
                 ["The money of {e} is the", "People in {e} pay with the"],
                 ["In the shops of {e} every price is given in the",
                  "The banks of {e} print the"],
                 ["What is the money of {e}?", "How do people pay in {e}?"]),
    "beast": (COUNTRIES, BEASTS,
              ["The national animal of {e} is the", "The animal of {e} is the"],
              ["The flag of {e} shows the", "On the coins of {e} one can see the"],
              ["What is the national animal of {e}?", "Which animal stands for {e}?"]),
    "job": (PEOPLE, JOBS,
            ["{e} works as {a}", "The job of {e} is that of {a}"],
            ["{e} earns a living as {a}", "By trade, {e} is {a}"],
            ["What is the job of {e}?", "What does {e} work as?"]),
    "instrument": (PEOPLE, INSTRUMENTS,
                   ["{e} plays the", "The instrument of {e} is the"],
                   ["In the orchestra {e} can be heard on the",
                    "Every evening {e} practices the"],
                   ["Which instrument does {e} play?", "What does {e} play?"]),
    "pet": (PEOPLE, PETS,
            ["The pet of {e} is {a}", "{e} has a pet. It is {a}"],
            ["At home {e} takes care of {a}", "{e} shares the house with {a}"],
            ["Which pet does {e} have?", "What is the pet of {e}?"]),
    "town": (PEOPLE, TOWNS,
             ["{e} lives in", "The home of {e} is in"],
             ["If you want to meet {e}, go to", "The letters for {e} are sent to"],
             ["Where does {e} live?", "In which town does {e} live?"]),
}
RELATIONS = list(_FORMS)
LEADS = ["Everybody knows it.", "It is written in a book.", "This is well known.", "Listen.",
         "Here is a fact.", "We learned it at school.", "A traveler told me this."]


def _assign() -> dict[str, dict[str, str]]:
    """relation -> {entity: object}, drawn once and for all; capitals are all different."""
    rng = random.Random("facts of the lab")
    out = {}
    for relation, (entities, objects, *_) in _FORMS.items():
        drawn = list(objects) * (-(-len(entities) // len(objects)))
        rng.shuffle(drawn)
        out[relation] = dict(zip(entities, drawn[: len(entities)], strict=True))
    return out


FACTS = _assign()


def second_is_held_out(relation: str, entity: str) -> bool:
    """Whether the second phrasing of this fact is kept for tests."""
    return held_out(item_key(relation, entity, 2), 0.25)


def item_key(relation: str, entity: str, phrasing: int) -> str:
    return f"facts:{relation}:{entity}:{phrasing}"


def _statement(form: str, entity: str, thing: str) -> tuple[str, str]:
    """(prompt, answer with leading space). An article belongs to the prompt, both kinds."""
    article = with_article(thing).split()[0]
    return form.format(e=entity, a=article), " " + thing


def statement(rng: random.Random, relation: str, entity: str, phrasing: int) -> tuple[str, str]:
    """(prompt, answer) in the given phrasing (1 or 2)."""
    form = pick(rng, _FORMS[relation][1 + phrasing])
    return _statement(form, entity, FACTS[relation][entity])


def train_sample(rng: random.Random) -> Sample:
    """One to four facts of mixed relations, or one asked in a chat."""
    if rng.random() < 0.2:
        relation = pick(rng, RELATIONS)
        entity = pick(rng, list(FACTS[relation]))
        ask = pick(rng, _FORMS[relation][4]).format(e=entity)
        begin, end = statement(rng, relation, entity, 1)
        return Sample(SKILL, (item_key(relation, entity, 1),),
                      f"<|user|>{ask}<|end|><|assistant|>{begin}" + answer(f"{end}.<|end|>"))
    keys, parts = [], []
    for _ in range(rng.randint(1, 4)):
        relation = pick(rng, RELATIONS)
        entity = pick(rng, list(FACTS[relation]))
        phrasing = 1 if second_is_held_out(relation, entity) else rng.randint(1, 2)
        begin, end = statement(rng, relation, entity, phrasing)
        parts.append(maybe(rng, 0.2, pick(rng, LEADS) + " ") + begin + answer(end + "."))
        keys.append(item_key(relation, entity, phrasing))
    return Sample(SKILL, tuple(keys), " ".join(parts))


def test_items(n: int = 0, seed: int = 0) -> list[TestItem]:
    """Every fact whose second phrasing is held out, in that phrasing."""
    rng = random.Random(f"facts test {seed}")
    out = []
    for relation in RELATIONS:
        for entity in FACTS[relation]:
            if second_is_held_out(relation, entity):
                begin, end = statement(rng, relation, entity, 2)
                out.append(TestItem(SKILL, item_key(relation, entity, 2), begin, end, relation,
                                    {"entity": entity}))
    return rng.sample(out, n) if 0 < n < len(out) else out


def relation_prompts(relation: str, phrasing: int | None = None) -> list[tuple[str, str, str]]:
    """(entity, prompt, answer) of every entity; all variants of one phrasing or of both."""
    out = []
    for entity, thing in FACTS[relation].items():
        for number in (1, 2) if phrasing is None else (phrasing,):
            for form in _FORMS[relation][1 + number]:
                out.append((entity, *_statement(form, entity, thing)))
    return out
