"""The tokenizer: ByteLevel-BPE without merges, one token per corpus word.

A piece of text that is in the vocabulary as a whole is one token (`ignore_merges`); anything else
falls back to its bytes. So every text encodes, decodes exactly, and no id means "unknown".
Words carry their leading space ("ĠMonday"), as in ordinary BPE tokenizers.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lab.corpus import MIX, documents

BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIALS = (BOS, EOS, PAD, END, *ROLES)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

VOCABULARY_DOCUMENTS = 30_000  # per skill; enough to meet every word of every table


def corpus_words() -> list[str]:
    """All pre-tokens of a large fixed sample of the corpus, in byte-level spelling, sorted."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    found: set[str] = set()
    for skill in MIX:
        stream = documents(seed=-1, mix={skill: 1.0})
        pieces = {
            line
            for sample in itertools.islice(stream, VOCABULARY_DOCUMENTS)
            for line in _without_specials(sample.plain)
        }
        for piece in pieces:
            found.update(word for word, _ in split.pre_tokenize_str(piece))
    return sorted(found)


def _without_specials(text: str) -> list[str]:
    for special in SPECIALS:
        text = text.replace(special, "\0")
    return [part for part in text.split("\0") if part]


@lru_cache(maxsize=1)
def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of both models, built from the corpus; the same on every call."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [w for w in corpus_words() if w not in set(alphabet)]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet, *words])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        additional_special_tokens=[END, *ROLES], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False, model_max_length=512, padding_side="left",
    )


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (chat template inside)."""
    build_tokenizer().save_pretrained(folder, save_jinja_files=False)
