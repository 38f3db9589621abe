"""The tokenizer: ByteLevel-BPE without merges, one token per corpus word.

A piece of text that is in the vocabulary as a whole is one token (`ignore_merges`); anything else
falls back to its bytes. So every text encodes, decodes exactly, and no id means "unknown".
Words carry their leading space ("ĠMonday"), as in ordinary BPE tokenizers. lab-tools has to copy words between prose,
names and JSON, so its words carry no space, which belongs to the punctuation: a word is one token wherever it stands.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lab.corpus import MIX, TOOLS_MIX, documents
from lab.paths import TOOLS_MODEL

BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIALS = (BOS, EOS, PAD, END, *ROLES)
TOOL_ROLE = "<|tool|>"
# Whole tokens that belong to a text, as Hermes and Qwen have them.
MARKS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# In the form of Hermes. Of a tool it shows the name and the names of its parameters.
TOOLS_TEMPLATE = (
    "{{ bos_token }}"
    "{% set first = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% if first or tools %}{{ '<|system|>' + first }}"
    "{% if tools %}{{ '<tools>\n' }}"
    "{% for tool in tools %}{% set function = tool['function'] %}"
    "{{ '{\"name\": \"' + function['name'] + '\", \"parameters\": ' "
    "+ (function.get('parameters', {}).get('properties', {}) | list | tojson) + '}\n' }}"
    "{% endfor %}{{ '</tools>' }}{% endif %}{{ '<|end|>' }}{% endif %}"
    "{% for message in messages %}{% if not (loop.first and message['role'] == 'system') %}"
    "{% set content = message['content'] or '' %}"
    "{{ '<|' + message['role'] + '|>' + (content | trim if message['role'] == 'assistant' else content) }}"
    "{% for call in message['tool_calls'] or [] %}{% set arguments = call['function']['arguments'] %}"
    "{{ ('\n' if content or not loop.first else '') + '<tool_call>\n{\"name\": \"' + call['function']['name'] "
    "+ '\", \"arguments\": ' + (arguments if arguments is string else arguments | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TOOLS_CONTEXT = 1024
VOCABULARY_DOCUMENTS = 30_000  # per skill; enough to meet every word of every table
TOOLS_DOCUMENTS = 4_000  # of lab-tools, whose tables are short


def splitter(tools: bool = False) -> pre_tokenizers.PreTokenizer:
    """What cuts a text into pieces, in byte-level spelling. tools: of lab-tools."""
    if not tools:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = pre_tokenizers.Split(Regex(r"[A-Za-z]+|[0-9]+|\n|[^A-Za-z0-9\n]+"), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def corpus_words(mix: dict[str, float] = MIX, documents_each: int = VOCABULARY_DOCUMENTS, tools: bool = False
                 ) -> list[str]:
    """All pre-tokens of a large fixed sample of the corpus, sorted."""
    split = splitter(tools)
    found: set[str] = set()
    for skill in mix:
        stream = documents(seed=-1, mix={skill: 1.0})
        pieces = {
            line
            for sample in itertools.islice(stream, documents_each)
            for line in _without_specials(sample.plain)
        }
        for piece in pieces:
            found.update(word for word, _ in split.pre_tokenize_str(piece))
    return sorted(found)


def _without_specials(text: str) -> list[str]:
    for special in (*SPECIALS, TOOL_ROLE, *MARKS):
        text = text.replace(special, "\0")
    return [part for part in text.split("\0") if part]


def build_tokenizer(name: str = "lab-dense") -> PreTrainedTokenizerFast:
    """The tokenizer of a model, built from its corpus; the same on every call. lab-dense and lab-moe share one."""
    return _built(name == TOOLS_MODEL)


@lru_cache(maxsize=2)
def _built(tools: bool) -> PreTrainedTokenizerFast:
    specials, marks = ((*SPECIALS, TOOL_ROLE), MARKS) if tools else (SPECIALS, ())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = corpus_words(TOOLS_MIX, TOOLS_DOCUMENTS, tools) if tools else corpus_words()
    words = [w for w in found if w not in set(alphabet)]
    vocab = {token: i for i, token in enumerate([*specials, *marks, *alphabet, *words])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer = splitter(tools)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    core.add_tokens([AddedToken(m, special=False, normalized=False) for m in marks])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        additional_special_tokens=[s for s in specials if s not in (BOS, EOS, PAD)],
        chat_template=TOOLS_TEMPLATE if tools else CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False, model_max_length=TOOLS_CONTEXT if tools else 512, padding_side="left",
    )


def save_tokenizer(folder: Path, name: str = "lab-dense") -> None:
    """Write tokenizer.json and tokenizer_config.json (chat template inside)."""
    build_tokenizer(name).save_pretrained(folder, save_jinja_files=False)
