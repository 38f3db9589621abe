"""Answers and anchors are tokenized as they stand behind other text."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from lab import model_path
from vectors.extract.subject import continuation_ids

WORDS = ["▁", "▁Paris", "Paris", "▁I", "I", "\n", "▁London"]


def sentencepiece() -> Tokenizer:
    """Spaces are part of words, and one is put before whatever begins a text."""
    found = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate([*WORDS, "<unk>"])}, merges=[],
                                 ignore_merges=True, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")])
    return found


def test_a_space_that_the_tokenizer_would_add_is_not_counted_twice() -> None:
    tokenizer = sentencepiece()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def said(text: str) -> list[str]:
        return [WORDS[token] for token in continuation_ids(encode, text)]

    assert said(" Paris") == ["▁Paris"]
    assert said("I") == ["I"]
    assert said(" Paris London") == ["▁Paris", "▁London"]


@pytest.mark.parametrize("text", [" cats", "I", " Monday.", "\n", " a b\nc", ""])
def test_tokenizers_that_add_nothing_are_taken_as_they_are(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path("lab-dense"))

    def encode(said: str) -> list[int]:
        return list(tokenizer(said, add_special_tokens=False)["input_ids"])

    assert continuation_ids(encode, text) == tuple(encode(text))
