"""Words and facts, written for this repository: pairs of two tasks, and relations with a question and an answer each.

A thing is an item: what is said of it stands in one split, which its place in the list decides.
"""

from collections.abc import Mapping
from typing import Any

# Of ten things in a row, five are for train, two for dev and three for test.
SPLITS = ("test", "dev", "train", "test", "train", "train", "test", "train", "dev", "train")

COUNTRIES = """France Paris French; Germany Berlin German; Italy Rome Italian; Spain Madrid Spanish; Portugal Lisbon
Portuguese; Greece Athens Greek; Sweden Stockholm Swedish; Norway Oslo Norwegian; Finland Helsinki Finnish; Denmark
Copenhagen Danish; Poland Warsaw Polish; Hungary Budapest Hungarian; Russia Moscow Russian; Turkey Ankara Turkish;
Japan Tokyo Japanese; China Beijing Chinese; Thailand Bangkok Thai; Vietnam Hanoi Vietnamese; Iran Tehran Persian;
Egypt Cairo Arabic; Iraq Baghdad Arabic; Syria Damascus Arabic; Lebanon Beirut Arabic; Cuba Havana Spanish; Peru
Lima Spanish; Chile Santiago Spanish; Argentina Buenos_Aires Spanish; Colombia Bogota Spanish; Austria Vienna
German; Ireland Dublin English; England London English; Kenya Nairobi Swahili; Ukraine Kyiv Ukrainian; Romania
Bucharest Romanian; Bulgaria Sofia Bulgarian; Croatia Zagreb Croatian; Serbia Belgrade Serbian; Iceland Reykjavik
Icelandic; Nepal Kathmandu Nepali; Bangladesh Dhaka Bengali; Ethiopia Addis_Ababa Amharic; Venezuela Caracas
Spanish; Ecuador Quito Spanish; Morocco Rabat Arabic; Tunisia Tunis Arabic; Jordan Amman Arabic; Indonesia Jakarta
Indonesian; Malaysia Kuala_Lumpur Malay"""

OPPOSITES = """hot cold; big small; tall short; old young; happy sad; fast slow; good bad; light dark; rich poor;
strong weak; wet dry; hard soft; loud quiet; clean dirty; full empty; early late; easy difficult; high low; deep
shallow; wide narrow; thick thin; open closed; cheap expensive; brave cowardly; smooth rough; sharp dull; true
false; right wrong; first last; up down; inside outside; left right; day night; love hate; war peace; win lose;
begin end; buy sell; push pull; give take; north south; east west; summer winter; black white; friend enemy; male
female; past future; question answer; life death; success failure; before after; more less; above below; always
never; remember forget; ancient modern; alive dead; awake asleep; guilty innocent; public private"""

COLOURS = """banana yellow; grass green; snow white; coal black; blood red; sky blue; lemon yellow; tomato red; milk
white; carrot orange; chocolate brown; leaf green; strawberry red; salt white; frog green; cherry red; pumpkin
orange; butter yellow; cucumber green; flamingo pink; crow black; sunflower yellow; broccoli green; rose red; swan
white; ruby red; emerald green; sapphire blue; mud brown; pea green; ocean blue; polar_bear white; canary yellow;
fire_engine red; spinach green; corn yellow; lime green; tar black; cotton white; bear brown"""

PLURALS = """cat cats; dog dogs; house houses; tree trees; book books; car cars; river rivers; chair chairs; table
tables; apple apples; bird birds; stone stones; cloud clouds; letter letters; city cities; baby babies; lady ladies;
story stories; country countries; party parties; box boxes; bus buses; glass glasses; dish dishes; church churches;
watch watches; brush brushes; fox foxes; leaf leaves; knife knives; wife wives; wolf wolves; man men; woman women;
child children; foot feet; tooth teeth; mouse mice; goose geese; teacher teachers; farmer farmers; window windows;
door doors; garden gardens; road roads; ship ships; horse horses; hand hands; friend friends; school schools; song
songs; game games; king kings; queen queens; star stars; flower flowers; mountain mountains; island islands; bridge
bridges; village villages; plant plants; student students; doctor doctors; picture pictures; ticket tickets; pencil
pencils; lesson lessons; field fields"""


def table(words: str) -> list[list[str]]:
    return [[word.replace("_", " ") for word in entry.split()] for entry in words.split(";")]


def task(words: str) -> list[dict[str, Any]]:
    """Pairs as the method function_vector takes them; the first two words of each entry."""
    return [{"input": given, "output": wanted, "split": split_of(n)}
            for n, (given, wanted, *_) in enumerate(table(words))]


def split_of(place: int) -> str:
    return SPLITS[place % len(SPLITS)]


TASKS: Mapping[str, list[dict[str, Any]]] = {
    "capital": task(COUNTRIES), "opposite": task(OPPOSITES), "plural": task(PLURALS)}


def relations() -> list[dict[str, Any]]:
    """Facts as the method relation_neurons takes them."""
    found = []
    for n, (country, capital, language) in enumerate(table(COUNTRIES)):
        found += [_fact("capital", n, country, f"The capital of {country} is the city of", capital),
                  _fact("language", n, country, f"The people of {country} speak a language called", language)]
    found += [_fact("opposite", n, word, f"The opposite of {word} is", other)
              for n, (word, other) in enumerate(table(OPPOSITES))]
    found += [_fact("colour", n, thing, f"The colour of {thing} is usually", colour)
              for n, (thing, colour) in enumerate(table(COLOURS))]
    return found


MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")
# Sentences that SmolLM2 goes on with the right month for nine to eleven of twelve; of "Last month was" it knows none.
NEXT_MONTH = {"train": ("This month is {}. Next month is", "It is {} now. Next month is",
                        "If this month is {}, next month is"),
              "dev": ("We are in {}. The next month is",),
              "test": ("This month is {}, and the month after it is", "The current month is {}. Next month will be")}


def months(split: str | None = None) -> list[dict[str, Any]]:
    """Prompts as the method manifold takes them, whose answers are months; each sentence is in one split."""
    return [{"text": sentence.format(month), "label": MONTHS[(n + 1) % len(MONTHS)], "item": sentence, "split": name}
            for name, sentences in NEXT_MONTH.items() if split in (None, name)
            for sentence in sentences for n, month in enumerate(MONTHS)]


def _fact(relation: str, place: int, item: str, text: str, answer: str) -> dict[str, Any]:
    return {"text": text, "answer": f" {answer}", "label": relation, "item": item, "split": split_of(place)}
