"""Languages: the same simple sentences in English, French, Spanish and German.

A diary opens with a language-neutral line ("12 / 4") or at once; its sentences then stay in one
language. An item is (subject, verb, place); held-out items occur in no language in training.

A right intervention changes `language_of` the continuation. Marker words are the words that only
one of the four languages has, found from the tables themselves.
"""

from __future__ import annotations

import random
import re

from lab.corpus.sample import Sample, TestItem, answer, capital, held_out, pick

SKILL = "languages"
LANGUAGES = ("english", "french", "spanish", "german")

# Each row is the same phrase in the four languages, in the order above.
SUBJECTS = [r.split("|") for r in """the cat|le chat|el gato|die Katze
the dog|le chien|el perro|der Hund
the child|l'enfant|el niño|das Kind
the old man|le vieil homme|el anciano|der alte Mann
the woman|la femme|la mujer|die Frau
my brother|mon frère|mi hermano|mein Bruder
my sister|ma sœur|mi hermana|meine Schwester
the teacher|le professeur|el maestro|der Lehrer
the baker|le boulanger|el panadero|der Bäcker
the king|le roi|el rey|der König
our neighbor|notre voisin|nuestro vecino|unser Nachbar
the doctor|le médecin|el médico|der Arzt
the girl|la fille|la niña|das Mädchen
the horse|le cheval|el caballo|das Pferd
my friend|mon ami|mi amigo|mein Freund
the bird|l'oiseau|el pájaro|der Vogel
the sailor|le marin|el marinero|der Seemann
my grandmother|ma grand-mère|mi abuela|meine Großmutter
the farmer|le paysan|el campesino|der Bauer
the queen|la reine|la reina|die Königin""".splitlines()]
VERBS = [r.split("|") for r in """sleeps|dort|duerme|schläft
eats|mange|come|isst
sings|chante|canta|singt
works|travaille|trabaja|arbeitet
waits|attend|espera|wartet
plays|joue|juega|spielt
drinks|boit|bebe|trinkt
reads|lit|lee|liest
writes|écrit|escribe|schreibt
laughs|rit|ríe|lacht
dances|danse|baila|tanzt
rests|se repose|descansa|ruht
sits|reste assis|se sienta|sitzt
walks|marche|camina|geht
talks|parle|habla|redet
dreams|rêve|sueña|träumt""".splitlines()]
PLACES = [r.split("|") for r in """in the garden|dans le jardin|en el jardín|im Garten
in the house|dans la maison|en la casa|im Haus
near the river|près de la rivière|cerca del río|am Fluss
in the kitchen|dans la cuisine|en la cocina|in der Küche
at the market|au marché|en el mercado|auf dem Markt
in front of the church|devant l'église|delante de la iglesia|vor der Kirche
under the tree|sous l'arbre|debajo del árbol|unter dem Baum
in the school|dans l'école|en la escuela|in der Schule
on the beach|sur la plage|en la playa|am Strand
in the street|dans la rue|en la calle|auf der Straße
behind the castle|derrière le château|detrás del castillo|hinter dem Schloss
in the forest|dans la forêt|en el bosque|im Wald""".splitlines()]
TIMES = [r.split("|") for r in """today|aujourd'hui|hoy|heute
in the morning|le matin|por la mañana|am Morgen
every evening|chaque soir|cada noche|jeden Abend
now|maintenant|ahora|jetzt
after dinner|après le dîner|después de la cena|nach dem Essen
again|encore|otra vez|wieder
always|toujours|siempre|immer
on Sunday|dimanche|el domingo|am Sonntag""".splitlines()]
REMARKS = [r.split("|") for r in """It is cold.|Il fait froid.|Hace frío.|Es ist kalt.
The sun shines.|Le soleil brille.|El sol brilla.|Die Sonne scheint.
Nobody knows why.|Personne ne sait pourquoi.|Nadie sabe por qué.|Niemand weiß warum.
That is all for today.|C'est tout pour aujourd'hui.|Eso es todo por hoy.|Das ist alles für heute.
It is late.|Il est tard.|Es tarde.|Es ist spät.
The house is quiet.|La maison est calme.|La casa está tranquila.|Das Haus ist still.
I am happy.|Je suis content.|Estoy contento.|Ich bin froh.
We are tired.|Nous sommes fatigués.|Estamos cansados.|Wir sind müde.""".splitlines()]
_WORD = re.compile(r"[^\W\d_]+")


def _markers() -> dict[str, frozenset[str]]:
    """language -> words no other language's table has (lower case)."""
    words: dict[str, set[str]] = {}
    for i, language in enumerate(LANGUAGES):
        text = " ".join(row[i] for t in (SUBJECTS, VERBS, PLACES, TIMES, REMARKS) for row in t)
        words[language] = {w.lower() for w in _WORD.findall(text)}
    return {a: frozenset(words[a].difference(*(words[b] for b in LANGUAGES if b != a)))
            for a in LANGUAGES}


MARKERS = _markers()


def item_key(subject: int, verb: int, place: int) -> str:
    return f"languages:{subject}:{verb}:{place}"


def _item(rng: random.Random, test: bool) -> tuple[int, int, int]:
    while True:
        item = (rng.randrange(len(SUBJECTS)), rng.randrange(len(VERBS)), rng.randrange(len(PLACES)))
        if held_out(item_key(*item)) is test:
            return item


def sentence(language: str, subject: int, verb: int, place: int, time: int | None) -> str:
    """One sentence; German puts the time before the place, as it must."""
    i = LANGUAGES.index(language)
    s, v, p = SUBJECTS[subject][i], VERBS[verb][i], PLACES[place][i]
    when = "" if time is None else " " + TIMES[time][i]
    tail = f"{when} {p}" if language == "german" else f" {p}{when}"
    return capital(f"{s} {v}{tail}.")


def heading(rng: random.Random) -> str:
    """A line that belongs to no language: a date in digits."""
    return f"{rng.randint(1, 28)} / {rng.randint(1, 12)}:"


def _times(rng: random.Random) -> int | None:
    return rng.randrange(len(TIMES)) if rng.random() < 0.5 else None


def _page(rng: random.Random, language: str, sentences: int, test: bool = False) -> tuple[tuple[str, ...], str]:
    """(keys, text) of some sentences in one language."""
    i = LANGUAGES.index(language)
    keys, parts = [], []
    for _ in range(sentences):
        item = _item(rng, test)
        keys.append(item_key(*item))
        parts.append(sentence(language, *item, _times(rng)))
        if rng.random() < 0.2:
            parts.append(pick(rng, REMARKS)[i])
    return tuple(keys), " ".join(parts)


def train_sample(rng: random.Random) -> Sample:
    """A diary page of two to five sentences; two in three carry a neutral heading."""
    language = pick(rng, LANGUAGES)
    keys, text = _page(rng, language, rng.randint(2, 5))
    if rng.random() < 0.67:
        return Sample(SKILL, keys, heading(rng) + answer(" " + text))
    return Sample(SKILL, keys, text)


def test_items(n: int, seed: int = 0) -> list[TestItem]:
    """One held-out sentence, sometimes under a heading; the continuation must keep the language."""
    rng = random.Random(f"languages test {seed}")
    out = []
    for i in range(n):
        language = LANGUAGES[i % 4]
        keys, text = _page(rng, language, 1, test=True)
        if rng.random() < 0.5:
            text = heading(rng) + " " + text
        out.append(TestItem(SKILL, keys[0], text, language, language))
    return out


def marker_counts(text: str) -> dict[str, int]:
    """language -> number of its marker words in the text."""
    words = [w.lower() for w in _WORD.findall(text)]
    return {name: sum(w in marks for w in words) for name, marks in MARKERS.items()}


def language_of(text: str) -> str:
    """The language whose markers occur; 'mixed' if two languages have two or more, 'none' if no
    marker occurs. A single foreign marker beside many others is not enough for 'mixed'."""
    counts = sorted(((c, name) for name, c in marker_counts(text).items()), reverse=True)
    if counts[0][0] == 0:
        return "none"
    return "mixed" if counts[1][0] >= 2 or counts[0][0] == counts[1][0] else counts[0][1]
