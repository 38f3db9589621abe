"""How words that a tokenizer does not know are told of."""

from tests.vectors.extract.toy import Toy
from vectors.extract.spelling import SpellingSubject, spelling_report
from vectors.extract.subject import Tokens, Turn


class ByteToy(Toy):
    """Every byte is a token."""

    def encode_continuation(self, text: str) -> Tokens:
        return tuple(text.encode())


def test_bytes_per_token_are_counted_over_all_texts() -> None:
    subject = SpellingSubject(Toy())
    assert subject.report() == {}
    assert subject.encode("some words") == Toy().encode("some words")
    subject.encode_continuation("third")
    subject.encode([1, 2, 3])
    # Two words and the token before them, then one: 15 bytes in 4 tokens.
    assert subject.report() == {"bytes_per_token": 3.75}


def test_texts_spelled_in_bytes_are_warned_of() -> None:
    subject = SpellingSubject(ByteToy())
    subject.encode("unorthodox")
    subject.encode([Turn(role="user", content="vignette")])
    report = subject.report()
    assert report["bytes_per_token"] < 1
    assert "toy has no tokens for most words" in report["warnings"][0]


def test_scripts_of_long_characters_are_not() -> None:
    text = "你好世界"
    assert spelling_report(len(text.encode()), len(text), "m") == {"bytes_per_token": 3.0}
