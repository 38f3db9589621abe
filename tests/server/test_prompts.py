"""Roles of prompt tokens: exact for templates that keep turns apart, refused for others."""

import pytest

from server.openai.prompts import ChatPrompts
from server.openai.vocabulary import Vocabulary
from steering.errors import InvalidRequest, InvalidSpec
from tests.server.tokenizers import DEFAULT_SYSTEM, LAB, LAST_USER, MERGED, STRICT, byte_tokenizer

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "hello world"}
REPLY = {"role": "assistant", "content": " good day"}
MORE = {"role": "user", "content": " bad \U0001f600 <|assistant|> day"}


def parts(template: str | None, messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    """(role, text) of each stretch of tokens with one role."""
    vocabulary = Vocabulary(byte_tokenizer(template), [1], 300)
    prompt = ChatPrompts(vocabulary).prompt(messages, roles=True)
    assert prompt.roles is not None and len(prompt.roles) == len(prompt.token_ids)
    found: list[tuple[str, list[int]]] = []
    for role, token in zip(prompt.roles, prompt.token_ids, strict=True):
        if not found or found[-1][0] != role:
            found.append((role, []))
        found[-1][1].append(token)
    return [(role, vocabulary.tokenizer.decode(ids)) for role, ids in found]


def test_plain_template() -> None:
    assert parts(LAB, [SYSTEM, USER, REPLY, MORE]) == [
        ("preamble", "<|bos|>"),
        ("system", "<|system|>be brief<|end|>"),
        ("user", "<|user|>hello world<|end|>"),
        ("assistant", "<|assistant|> good day<|end|>"),
        # A marker written by the user is still the user's.
        ("user", "<|user|> bad \U0001f600 <|assistant|> day<|end|>"),
        ("assistant", "<|assistant|>"),
    ]


def test_neighbours_of_one_role() -> None:
    assert parts(LAB, [USER, USER])[1] == ("user", "<|user|>hello world<|end|>" * 2)


def test_default_system_prompt_is_preamble() -> None:
    assert parts(DEFAULT_SYSTEM, [USER, REPLY, USER])[:2] == [
        ("preamble", "<|system|>be kind<|end|>"), ("user", "<|user|>hello world<|end|>")]
    assert parts(DEFAULT_SYSTEM, [SYSTEM, USER])[0] == ("system", "<|system|>be brief<|end|>")


def test_template_that_refuses_system_and_disorder() -> None:
    assert parts(STRICT, [USER, REPLY, USER]) == [
        ("preamble", "<|bos|>"), ("user", "<|user|>hello world<|end|>"),
        ("assistant", "<|assistant|>good day<|end|>"), ("user", "<|user|>hello world<|end|>"),
        ("assistant", "<|assistant|>")]


def test_merged_system_is_refused_only_where_there_is_one() -> None:
    assert parts(MERGED, [USER])[1] == ("user", "<|user|>hello world<|end|>")
    with pytest.raises(InvalidSpec) as caught:
        parts(MERGED, [SYSTEM, USER])
    assert "turns apart" in caught.value.message


def test_text_that_moves_between_turns_is_refused() -> None:
    with pytest.raises(InvalidSpec):
        parts(LAST_USER, [SYSTEM, USER, REPLY, USER])


def test_a_token_across_two_turns_is_refused() -> None:
    # "ST" ends one turn and "OP" begins the next: one token, "STOP".
    words = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}OP{% endif %}"
    with pytest.raises(InvalidSpec) as caught:
        parts(words, [{"role": "user", "content": "ST"}])
    assert "two turns" in caught.value.message


def test_roles_are_not_worked_out_unless_wanted() -> None:
    vocabulary = Vocabulary(byte_tokenizer(MERGED), [1], 300)
    assert ChatPrompts(vocabulary).prompt([SYSTEM, USER], roles=False).roles is None


@pytest.mark.parametrize(("template", "messages"), [(None, [USER]), (STRICT, [SYSTEM, USER]), (STRICT, [USER, USER])])
def test_conversations_the_template_refuses(template: str | None, messages: list[dict[str, str]]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatPrompts(Vocabulary(byte_tokenizer(template), [1], 300)).prompt(messages, roles=False)
    assert caught.value.param == "messages"


def test_the_tokens_are_those_of_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    vocabulary = Vocabulary(tokenizer, [1], 300)
    for roles in (False, True):
        assert ChatPrompts(vocabulary).prompt([SYSTEM, USER], roles=roles).token_ids == tokenizer.apply_chat_template(
            [SYSTEM, USER], tokenize=True, add_generation_prompt=True)["input_ids"]
