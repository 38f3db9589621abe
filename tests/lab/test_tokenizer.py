"""The tokenizer: exact round trips, one token per corpus word, the chat template."""

import itertools
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lab import MODEL_NAMES, model_path
from lab.batches import encode
from lab.corpus import documents
from lab.corpus.bandit import ARMS
from lab.corpus.calendar import SERIES
from lab.corpus.emotions import EMOTIONS, NEUTRAL
from lab.corpus.facts import FACTS
from lab.corpus.graph import WORDS
from lab.corpus.languages import PLACES, SUBJECTS, VERBS
from lab.corpus.sample import Sample
from lab.corpus.sentiment import NEGATIVE, POSITIVE
from lab.corpus.task_tables import TASKS
from lab.tokenizer import BOS, END, EOS, ROLES, SPECIALS, build_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief and clear."},
            {"role": "user", "content": "How do I cook soup?"}]


@lru_cache
def loaded(name):
    return AutoTokenizer.from_pretrained(model_path(name))


@pytest.fixture(scope="module", params=MODEL_NAMES)
def tok(request):
    return loaded(request.param)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_exactly(text):
    tok = loaded("lab-dense")
    ids = tok.encode(text, add_special_tokens=False)
    if not any(s in text for s in SPECIALS):
        assert tok.decode(ids) == text


@pytest.mark.parametrize("text", [
    "Hello there, Zörk!", "  two  spaces\n\n\tand a tab ", "日本語 and 🎈", "What comes next? It is",
    "it's 3.14 <not a token>",
])
def test_hand_picked_texts_come_back_exactly(tok, text):
    assert tok.decode(tok.encode(text, add_special_tokens=False)) == text


@pytest.mark.slow
def test_committed_tokenizers_are_those_the_corpus_makes(tok):
    assert tok.get_vocab() == build_tokenizer().get_vocab()


def single(tok, word):
    return len(tok.encode(" " + word, add_special_tokens=False)) == 1


def test_what_must_be_one_token_is_one_token(tok):
    promised = [
        *itertools.chain.from_iterable(SERIES.values()), *EMOTIONS, NEUTRAL, *ARMS, *WORDS,
        *itertools.chain.from_iterable(t.values() for t in TASKS.values()),
        *itertools.chain.from_iterable(t.values() for t in FACTS.values()),
        *POSITIVE, *NEGATIVE,
    ]
    assert [w for w in promised if not single(tok, w)] == []


def test_words_inside_sentences_of_every_language_are_one_token(tok):
    # Apostrophes and hyphens cut words, as in any byte-level tokenizer.
    words = {w for row in (*SUBJECTS, *VERBS, *PLACES) for text in row for w in text.split()
             if w.isalpha()}
    # A capital form exists where the word begins a sentence, the small one elsewhere.
    assert [w for w in words if not single(tok, w) and not single(tok, w.capitalize())] == []


def test_corpus_needs_no_byte_fallback(tok):
    known = {i for t, i in tok.get_vocab().items() if len(t) > 1}
    odd = 0
    total = 0
    for sample in itertools.islice(documents("fallback"), 2000):
        ids = tok.encode(sample.plain, add_special_tokens=False)
        total += len(ids)
        odd += sum(i not in known and tok.decode([i]).isalpha() and not tok.decode([i]).isascii()
                   for i in ids)
    assert odd / total < 0.001


def test_pieces_encode_like_the_whole_text():
    tok = loaded("lab-dense")
    samples = [Sample(s.skill, s.keys, s.text) for s in itertools.islice(documents("whole"), 1000)]
    specials = set(tok.convert_tokens_to_ids([BOS, EOS]))
    for sample, (ids, chance) in zip(samples, encode(tok, samples), strict=True):
        assert len(ids) == len(chance)
        assert tok.decode([i for i in ids if i not in specials]) == sample.plain
        if all(c > 0 for c in chance[2:]):  # no word of it was spelled out
            whole = tok.encode(sample.plain, add_special_tokens=False)
            assert [i for i in ids if i not in specials] == whole


def test_chat_template(tok):
    text = tok.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == ("<|bos|><|system|>Be brief and clear.<|end|><|user|>How do I cook soup?<|end|>"
                    "<|assistant|>")
    ids = tok.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert ids == tok.encode(text, add_special_tokens=False)
    assert ids.count(tok.bos_token_id) == 1
    done = [*MESSAGES, {"role": "assistant", "content": "Sure!"}]
    assert tok.apply_chat_template(done, tokenize=False).endswith("<|assistant|>Sure!<|end|>")


def test_special_tokens(tok):
    assert (tok.bos_token, tok.eos_token) == (BOS, EOS)
    assert tok.encode("Hello")[0] == tok.bos_token_id
    assert all(len(tok.encode(s, add_special_tokens=False)) == 1 for s in SPECIALS)
    assert tok.decode(tok.encode("<|user|>Hi!<|end|>"), skip_special_tokens=True) == "Hi!"
    assert {END, *ROLES} <= set(SPECIALS)
