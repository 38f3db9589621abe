"""Text of a completion, token by token. Whole responses join the same pieces that streams send."""

from collections.abc import Sequence, Set
from functools import partial

from server.text.vocabulary import NONE_SHOWN, REPLACEMENT, Vocabulary

# A character in UTF-8 has four bytes: of text that is not valid, at most this much can still become valid.
UNSETTLED = 3
CONTEXT_TOKENS = 4


class Detokenizer:
    """Turns ids into text that never has to be taken back.

    A window of tokens is decoded, so that spacing rules that look at the neighbour work. Characters that are not
    complete yet are held back until they are, or until `flush`. `tokenizers.decoders.DecodeStream` does not do here: it
    holds bytes that are no text back for as long as they go on, and cannot be asked for what it still holds when the
    completion ends.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int] = (), shown: Set[int] = NONE_SHOWN) -> None:
        """
        Args:
            prompt_ids: what the completion continues; a leading space of its first word depends on it.
            shown: special tokens that are a part of the text.
        """
        self._decode = partial(vocabulary.decode, shown=shown)
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._settled = len(self._ids)
        self._sent = len(self._decode(self._ids).rstrip(REPLACEMENT))

    def push(self, token_id: int) -> str:
        """Text that is certain now."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT):
            certain = max(len(text.rstrip(REPLACEMENT)), len(text) - UNSETTLED)
            return self._take(text[:certain])
        piece = self._take(text)
        # Slide: what was settled before this token is no longer needed, this token is the context of the next.
        self._ids = self._ids[self._settled:]
        self._settled = len(self._ids)
        self._sent = len(self._decode(self._ids))
        return piece

    def flush(self) -> str:
        """What was held back; characters that stay incomplete are replaced."""
        return self._take(self._decode(self._ids))

    def _take(self, text: str) -> str:
        piece = text[self._sent:]
        self._sent = max(self._sent, len(text))
        return piece
