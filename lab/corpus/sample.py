"""What a skill hands out: training documents, test items, and the rule that keeps them apart."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

# Answers are marked inside a document so that training can weigh them; the marks never reach a
# model. Both signs stand outside every vocabulary table.
OPEN, CLOSE = "\u27e6", "\u27e7"
_MARKS = re.compile(f"[{OPEN}{CLOSE}]")


@dataclass(frozen=True)
class Sample:
    """One training document. `keys` name the underlying items; a held-out key is never drawn."""

    skill: str
    keys: tuple[str, ...]
    text: str

    @property
    def plain(self) -> str:
        """The document as a reader sees it, without answer marks."""
        return _MARKS.sub("", self.text)

    @property
    def pieces(self) -> list[str]:
        """The text cut at the marks: even pieces are context, odd pieces are answers."""
        return _MARKS.split(self.text)


@dataclass(frozen=True)
class TestItem:
    """One held-out question: a prompt, what a right continuation is, and its sub-skill."""

    __test__ = False  # the name starts with Test; pytest must not collect it

    skill: str
    key: str
    prompt: str
    expected: Any
    kind: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def answer(text: str) -> str:
    """Mark `text` as the part of a document that shows the skill."""
    return f"{OPEN}{text}{CLOSE}"


def held_out(key: str, share: float = 0.1) -> bool:
    """Whether the item named `key` is kept for tests. Depends on the name alone, not on a seed."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < share * 2**32


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of `options`, evenly (random.choice spelt with the generator first, as all draws here)."""
    return options[int(rng.random() * len(options))]


def maybe(rng: random.Random, chance: float, text: str) -> str:
    """`text` with probability `chance`, else nothing."""
    return text if rng.random() < chance else ""


def capital(text: str) -> str:
    """First letter upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """'a cat', 'an apple'."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun
