"""Text piece by piece equals the text of all tokens at once, whatever the tokens are."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from server.text.detokenize import Detokenizer
from server.text.vocabulary import Vocabulary
from tests.server.tokenizers import byte_tokenizer

BYTES = Vocabulary(byte_tokenizer(), [1], 300)


def pieces(vocabulary: Vocabulary, ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary, prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 299), max_size=40))
def test_any_tokens(ids: list[int]) -> None:
    assert "".join(pieces(BYTES, ids, [])) == BYTES.decode(ids)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(max_size=30), st.text(max_size=10))
def test_any_text_behind_any_prompt(text: str, before: str) -> None:
    ids, prompt = BYTES.encode(text, special_tokens=False), BYTES.encode(before, special_tokens=False)
    assert "".join(pieces(BYTES, ids, prompt)) == BYTES.decode(ids)


def test_a_character_comes_whole() -> None:
    ids = BYTES.encode("a\U0001f600b", special_tokens=False)
    assert len(ids) == 6
    assert pieces(BYTES, ids, []) == ["a", "", "", "", "\U0001f600", "b", ""]


def test_invalid_bytes_do_not_hold_text_back_for_ever() -> None:
    stray = BYTES.encode("\u00e9", special_tokens=False)[1]
    out = pieces(BYTES, [stray] * 10, [])
    assert sum(bool(piece) for piece in out[:-1]) >= 6


def test_why_the_librarys_stream_does_not_do() -> None:
    """It says the same of whole texts, but nothing while bytes are no text, and never what it holds at the end."""
    core = byte_tokenizer().backend_tokenizer

    def streamed(ids: list[int]) -> list[str | None]:
        stream = DecodeStream(skip_special_tokens=True)
        return [stream.step(core, i) for i in ids]

    whole = BYTES.encode("a\U0001f600b", special_tokens=False)
    assert "".join(piece or "" for piece in streamed(whole)) == BYTES.decode(whole)
    stray = BYTES.encode("\u00e9", special_tokens=False)[1]
    assert streamed([stray] * 10) == [None] * 10
    assert BYTES.decode([stray] * 10) and "".join(pieces(BYTES, [stray] * 10, [])) == BYTES.decode([stray] * 10)


def test_spaces_that_sentencepiece_keeps_in_the_token_before() -> None:
    core = Tokenizer(models.BPE(vocab={"▁": 0, "▁one": 1, "▁two": 2, "x": 3}, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=core), [], 4)
    assert pieces(vocabulary, [2, 1, 3], [1]) == [" two", " one", "x", ""]
    assert pieces(vocabulary, [2, 1, 3], []) == ["two", " one", "x", ""]


def test_bytes_of_tokens_that_are_parts_of_characters() -> None:
    for text in ("\u00e9", "\U0001f600", " hello", "Ġ"):
        ids = BYTES.encode(text, special_tokens=False)
        assert bytes(b for i in ids for b in BYTES.token_bytes(i)) == text.encode()


def test_a_token_is_spelt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty alternatives for each token of many completions name the same tokens again and again."""
    vocabulary, calls = Vocabulary(byte_tokenizer(), [], 300), 0
    decode = vocabulary.tokenizer.decode

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return decode(*given, **named)

    monkeypatch.setattr(vocabulary.tokenizer, "decode", counted)
    ids = vocabulary.encode("a\u00e9", special_tokens=False)
    first = [(vocabulary.token_text(i), vocabulary.token_bytes(i)) for i in ids]
    for i in ids:
        vocabulary.token_bytes(i).append(0)
    assert [(vocabulary.token_text(i), vocabulary.token_bytes(i)) for i in ids] == first
    assert calls == len(ids) == 3


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    assert BYTES.decode([BYTES.known, BYTES.known + 1]) == ""
    assert BYTES.token_text(BYTES.known)
