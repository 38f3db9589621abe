"""Text and token ids: encoding prompts, the text and bytes of single tokens, which ids end a text."""

from collections.abc import Sequence, Set
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.text.bounds import TokenBound

REPLACEMENT = "\ufffd"
NONE_SHOWN: frozenset[int] = frozenset()


class Vocabulary:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], vocab_size: int) -> None:
        """
        Args:
            end_ids: tokens that end a completion, the model's end-of-text and end-of-turn tokens.
            vocab_size: rows of the model's output, which may be more than the tokenizer knows.
        """
        self.tokenizer = tokenizer
        self.end_ids = tuple(sorted(set(end_ids)))
        self.vocab_size = vocab_size
        self.known = len(tokenizer)
        self._bound = TokenBound(tokenizer)
        # Log-probabilities name twenty alternatives for each token: what was spelt once is kept, a hundred bytes or so
        # for each token of the vocabulary at most.
        self._spelt: dict[int, tuple[str, bytes]] = {}
        added = tokenizer.added_tokens_decoder
        self._special: dict[int, str] = {i: str(token) for i, token in added.items() if token.special}

    def least_tokens(self, text: str) -> int:
        """Tokens that `text` has at least, told without tokenising it; 0 where the tokenizer allows no such bound."""
        return self._bound.least(text)

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        """`special_tokens`: whether the tokenizer adds its own (BOS), as models are trained to see plain text."""
        return list(self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        """Ids, and per id the characters `[start, stop)` it stands for; None where the tokenizer cannot tell."""
        if not self.tokenizer.is_fast:
            return self.encode(text, special_tokens=False), None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]

    def decode(self, ids: Sequence[int], shown: Set[int] = NONE_SHOWN, *, special_tokens: bool = False) -> str:
        """Text, without special tokens but those in `shown`, unless all are wanted. Ids beyond the tokenizer (padding
        rows of the model's output) have none."""
        kept = [i for i in ids if i < self.known and (not shown or i in shown or i not in self._special)]
        return str(self.tokenizer.decode(kept, skip_special_tokens=not shown and not special_tokens,
                                         clean_up_tokenization_spaces=False))

    def special_ids(self, texts: Set[str]) -> frozenset[int]:
        """Special tokens that are written as one of these texts."""
        return frozenset(i for i, text in self._special.items() if text in texts)

    def spelled(self, token_id: int, shown: Set[int] = NONE_SHOWN) -> str:
        """What a token adds to the text, one character per byte; nothing for a special one that is not in `shown`."""
        if token_id >= self.known or (token_id in self._special and token_id not in shown):
            return ""
        return self._spelling(token_id)[1].decode("latin-1")

    def token_text(self, token_id: int) -> str:
        """The token by itself, special ones by their name; bytes that are no whole character are replaced."""
        return self._spelling(token_id)[0]

    def token_bytes(self, token_id: int) -> list[int]:
        """The UTF-8 bytes of the token, exact also where it is a part of a character."""
        return list(self._spelling(token_id)[1])

    def _spelling(self, token_id: int) -> tuple[str, bytes]:
        found = self._spelt.get(token_id)
        if found is None:
            text = f"<|{token_id}|>" if token_id >= self.known else str(
                self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
            found = text, self._bytes(token_id, text) if REPLACEMENT in text else text.encode()
            if token_id < self.vocab_size:
                self._spelt[token_id] = found
        return found

    def _bytes(self, token_id: int, text: str) -> bytes:
        """Of a token whose text shows that it is a part of a character, or the replacement character itself."""
        piece = str(self.tokenizer.convert_ids_to_tokens(token_id))
        if piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])
        table = _byte_of()
        return bytes(table[c] for c in piece) if all(c in table for c in piece) else text.encode()


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Byte-level tokenizers write each byte as one printable character."""
    spelling: dict[int, Any] = bytes_to_unicode()
    return {character: byte for byte, character in spelling.items()}
