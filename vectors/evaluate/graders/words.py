"""Text as words and sentences, in any script that puts something between them."""

import re
import unicodedata

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SENTENCE = re.compile(r"(?<=[.!?…])\s+|\n+")


def words(text: str) -> list[str]:
    """Lower-case, in order; numbers are words."""
    return [found.lower() for found in WORD.findall(text)]


def sentences(text: str) -> list[str]:
    return [part.strip() for part in _SENTENCE.split(text) if part.strip()]


def plain(text: str) -> str:
    """Lower-case, one kind of apostrophe, single spaces: what phrases are looked for in."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("’", "'").lower().split())
