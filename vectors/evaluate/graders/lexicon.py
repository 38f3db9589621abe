"""Whether a word belongs to a language, by simplemma's word lists of some 50 languages: 19 MB inside its package, which
needs nothing else. They are read at the first text of a language, which takes a second or two.
"""

import re
from functools import lru_cache

import simplemma
from simplemma.strategies.dictionaries.dictionary_factory import SUPPORTED_LANGUAGES

# "l'école" is two words, "aujourd'hui" and "don't" are one.
_PART = re.compile(r"[^\W\d_]{3,}'[^\W\d_]+|[^\W\d_]+")
_INTERNET = re.compile(r"https?://\S+|www\.\S+|\S+@\S+")


# Lists that are read whenever a text may be in one of them. Others take seconds and up to hundreds of megabytes and are
# for texts that are surely in that language.
COMMON_LISTS = ("de", "en", "es", "fr", "it", "nl", "pt")

# Words that never change their form are missing from some lists. How such words end, and those that end otherwise.
_UNCHANGING = {"fr": ("ment", "s", "x", "z"), "it": ("mente", "à", "ì"), "es": ("mente",), "pt": ("mente",)}
_MISSING = {
    "fr": frozenset("assez beaucoup comment dont déjà loin oui non peu plutôt pourquoi souvent tant tard tôt trop "
                    "aussitôt d'ailleurs".split()),
    "it": frozenset("abbastanza adesso sempre davvero due tre quattro cinque otto nove domani".split()),
    "es": frozenset(("antes", "tan")), "pt": frozenset(("nove",)), "nl": frozenset(("genoeg", "slechts")),
}


def has_words(language: str) -> bool:
    """Whether there is a list for this ISO 639-1 code."""
    return language in SUPPORTED_LANGUAGES


@lru_cache(maxsize=2**16)
def knows(language: str, word: str) -> bool:
    if word.lower().endswith(_UNCHANGING.get(language, ())) or word.lower() in _MISSING.get(language, ()):
        return True
    return any(simplemma.is_known(form, lang=language, low_memory=True) for form in {word, word.lower()})


def parts(text: str) -> list[str]:
    """Words to look up, as they are written: without addresses, cut at hyphens and at apostrophes behind a prefix,
    three letters or more. The lists have gaps among the shortest words.
    """
    return [part for part in _PART.findall(_INTERNET.sub(" ", text).replace("’", "'")) if len(part) > 2]
