"""Signs that a text has broken down: repetition, compressibility, length."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Degeneration:
    """repetition: share of n-grams (n = 3) that occurred before in the text, 0 for texts of fewer than 3 tokens.
    compression: bytes of the text over its zlib-compressed bytes; prose lies near 1 when short and 2 to 3 when long,
    loops far higher. length: tokens. ended: the model ended the text itself.
    """

    repetition: float
    compression: float
    length: int
    ended: bool


def degeneration(token_ids: Sequence[int], text: str, ended: bool) -> Degeneration:
    return Degeneration(repetition(token_ids), compression(text), len(token_ids), ended)


def repetition(token_ids: Sequence[int], n: int = 3) -> float:
    grams = [tuple(token_ids[i:i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression(text: str) -> float:
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw)) if raw else 0.0
