"""Chat templates of model families as they write them, in short, and tokenizers of their kinds that are made here."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# Thoughts of earlier turns are dropped, as in Qwen 3.
THINKING = (
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n' + system + '<|eot_id|>' }}"
    "{% for m in rest %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}")

# Name to template, BOS, EOS and what the tokenizer has besides.
FAMILIES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "smol": (SMOL, "<|im_start|>", "<|im_end|>", ("<|endoftext|>",)),
    "chatml": (CHATML, "<|endoftext|>", "<|im_end|>", ("<|im_start|>",)),
    "thinking": (THINKING, "<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<think>", "</think>")),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "gemma": (GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": (MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]")),
}
# Tokens that are added and not called special: part of the vocabulary of texts.
PLAIN = ("<think>", "</think>")


def family(name: str, *, sentencepiece: bool | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of the family's kind: bytes, or (Gemma, Mistral) characters with a mark for spaces and bytes as the
    last resort."""
    template, bos, eos, more = FAMILIES[name]
    spaced = name in ("gemma", "mistral") if sentencepiece is None else sentencepiece
    core = _characters() if spaced else _bytes()
    return finished(core, template, bos, eos, more)


def finished(core: Tokenizer, template: str, bos: str, eos: str, more: Sequence[str] = (), **flags: bool
             ) -> PreTrainedTokenizerFast:
    tokens = {"normalized": False, **flags}
    core.add_special_tokens([AddedToken(t, special=True, **tokens) for t in (bos, eos, *more) if t not in PLAIN])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in more if t in PLAIN])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, chat_template=template,
                                   clean_up_tokenization_spaces=False)


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("Ġterse", "Ġyou", "user", "assistant", "system", "Ġ" * 12, "a" * 9)
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate((*alphabet, *words))}, merges=[],
                                ignore_merges=True))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    return core


def _characters() -> Tokenizer:
    letters = [chr(n) for n in range(33, 127)]
    tokens = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *letters, "▁t", "he", "▁the", "▁▁"]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[
        ("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core
