"""Log-probabilities in OpenAI's two forms. Those of plain completions are written by the text of the tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from server.engines.data import Token
from server.requests.scoring import PromptToken
from server.text.detokenize import Detokenizer
from server.text.vocabulary import Vocabulary

Told = Token | PromptToken


class Teller:
    """Tells of the tokens of one text, piece by piece, and counts the characters of that text as it goes on."""

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int]) -> None:
        """before: tokens that the text continues and that are no part of it."""
        self._vocabulary = vocabulary
        self._text = Detokenizer(vocabulary, before)
        self._length = 0

    def told(self, tokens: Sequence[Told]) -> Logprobs:
        """A token whose log-probability is not known has null. A token that is a part of a character begins where the
        character does."""
        offsets = []
        for token in tokens:
            offsets.append(self._length)
            self._length += len(self._text.push(token.token_id))
        # OpenAI's type has no null in these lists, its answers do.
        probabilities: Any = [t.logprob for t in tokens]
        top: Any = [None if t.logprob is None else self._named(t.top_logprobs) for t in tokens]
        return Logprobs.model_construct(tokens=[name_of(self._vocabulary, t.token_id) for t in tokens],
                                        text_offset=offsets, token_logprobs=probabilities, top_logprobs=top)

    def _named(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """By name. A token whose text another one has as well is named by its id, so that none is lost."""
        found: dict[str, float] = {}
        for token_id, logprob in top:
            name = name_of(self._vocabulary, token_id)
            found[name if name not in found else f"token_id:{token_id}"] = logprob
        return found


def name_of(vocabulary: Vocabulary, token_id: int) -> str:
    """The text of a token; of one that is a part of a character its bytes, `bytes:\\xf0\\x9f`."""
    spelt = bytes(vocabulary.token_bytes(token_id))
    try:
        spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)
    return vocabulary.token_text(token_id)


def entries(vocabulary: Vocabulary, tokens: Iterable[Token]) -> list[ChatCompletionTokenLogprob]:
    """Of a chat. OpenAI's type has no null for a log-probability that is not known, its answers do."""
    return [ChatCompletionTokenLogprob.model_construct(
        token=vocabulary.token_text(t.token_id), bytes=vocabulary.token_bytes(t.token_id),
        logprob=t.logprob,  # type: ignore[arg-type]
        top_logprobs=[TopLogprob(token=vocabulary.token_text(i), bytes=vocabulary.token_bytes(i), logprob=p)
                      for i, p in t.top_logprobs]) for t in tokens]
