"""The least tokens a text can have, told from its bytes alone: what cannot fit is refused before it is tokenised.

Tokenising is slow on odd texts (seconds for a megabyte without a space); counting bytes takes milliseconds. A token
that stands for L bytes pays for each of them with 1/L of itself. A byte b thus costs at least 1/L(b), where L(b) is the
length of the longest token that holds b, and the costs of all bytes together are no more than the number of tokens.
Nothing that fits is refused: where a tokenizer may drop text, or stand in one token for any amount of it, no bound is
known and the least is 0.
"""

import json
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Pre-tokenizers that keep every character. Others are taken to drop some, as `Whitespace` does.
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")
_SPACE = "\u2581"
# A character in UTF-8 is as long at most: what an unknown one, a token by itself, stands for.
_CHARACTER_BYTES = 4
_FORMS: tuple[Literal["NFC", "NFKC", "NFD", "NFKD"], ...] = ("NFC", "NFKC", "NFD", "NFKD")


class TokenBound:
    """`known`: whether the tokenizer allows one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        described: dict[str, Any] = {}
        if tokenizer.is_fast:
            described = json.loads(tokenizer.backend_tokenizer.to_str())
        normal = _normalised(described.get("normalizer")) if described else None
        longest = _longest(described) if described else None
        self.known = normal is not None and longest is not None
        self._normal: Callable[[str], str] = normal or str
        self._cost = np.zeros(256) if longest is None else 1.0 / longest
        # Such tokens take the white space beside them along, however much there is.
        self._strips = any(token["lstrip"] or token["rstrip"] for token in described.get("added_tokens", ()))

    def least(self, text: str) -> int:
        """Tokens that `text` has at least; 0 where nothing is known."""
        if not self.known:
            return 0
        if self._strips:
            text = "".join(text.split())
        found = np.frombuffer(self._normal(text).encode("utf-8", "replace"), dtype=np.uint8)
        # Rounding of the sum must not refuse what fits by a hair.
        return math.ceil(float(np.bincount(found, minlength=256) @ self._cost) * (1 - 1e-9))


def _normalised(described: Mapping[str, Any] | None) -> Callable[[str], str] | None:
    """What the tokenizer does to a text first, or to one that is no longer; None for what is not known."""
    if described is None or described["type"] == "Prepend":
        return lambda text: text
    kind = described["type"]
    if kind in _FORMS:
        form = next(one for one in _FORMS if one == kind)
        return lambda text: unicodedata.normalize(form, text)
    if kind == "Replace" and described["pattern"].get("String"):
        old, new = described["pattern"]["String"], described["content"]
        return lambda text: text.replace(old, new)
    if kind == "Sequence":
        steps = [_normalised(one) for one in described["normalizers"]]
        known = [step for step in steps if step is not None]
        if len(known) < len(steps):
            return None
        return lambda text: _all(known, text)
    return None


def _all(steps: list[Callable[[str], str]], text: str) -> str:
    for step in steps:
        text = step(text)
    return text


def _longest(described: Mapping[str, Any]) -> "np.ndarray[Any, np.dtype[np.float64]] | None":
    """`[256]`: bytes of the longest token that holds each byte; None where a token may stand for any amount."""
    model, parts = described["model"], list(_parts(described.get("pre_tokenizer")))
    if model.get("type") != "BPE" or model.get("dropout") or any(not _keeps(part) for part in parts):
        return None
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    # As Latin-1 these are the bytes; what stands for none cannot be written in it.
    latin = {**dict.fromkeys(range(256), "\uffff"), **{ord(one): chr(byte) for one, byte in byte_of.items()}}
    vocab: Mapping[str, int] = model["vocab"]
    by_bytes = any(part["type"] == "ByteLevel" for part in parts)
    fallback = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    longest = np.ones(256)
    free = np.zeros(256, dtype=bool)
    # What is in no token is left out, or any run of it becomes one: it costs nothing.
    if by_bytes:
        free[[byte for character, byte in byte_of.items() if character not in vocab]] = True
    elif not fallback:
        longest[:] = _CHARACTER_BYTES
        if model.get("unk_token") is None or model.get("fuse_unk"):
            # Characters beyond ASCII share their bytes with others that may be unknown.
            free[128:] = True
            free[[byte for byte in range(128) if not {chr(byte), _SPACE if byte == 32 else chr(byte)} & vocab.keys()]
                 ] = True
    held: dict[int, set[int]] = defaultdict(set)
    for token in (*vocab, *(added["content"] for added in described["added_tokens"])):
        for spelt in _spellings(token, latin if by_bytes else None):
            held[len(spelt)].update(spelt)
    for length in sorted(held):
        places = list(held[length])
        longest[places] = np.maximum(longest[places], length)
    longest[free] = np.inf
    return longest


def _parts(described: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if described is None:
        return
    if described["type"] == "Sequence":
        for part in described["pretokenizers"]:
            yield from _parts(part)
        return
    yield described


def _keeps(part: Mapping[str, Any]) -> bool:
    if part["type"] in ("Split", "Punctuation"):
        return bool(part.get("behavior", "Isolated") != "Removed")
    return part["type"] in _KEEPING


def _spellings(token: str, latin: Mapping[int, str] | None) -> Iterator[bytes]:
    """The bytes that a token may stand for, in every way that it may be meant."""
    yield token.encode("utf-8", "replace")
    if latin is not None:
        with suppress(UnicodeEncodeError):
            yield token.translate(latin).encode("latin-1")
    if _SPACE in token:
        # As long as written, for a space may have been one already; a space itself costs as little.
        yield token.replace(_SPACE, " " * len(_SPACE.encode())).encode("utf-8", "replace")
