"""The language of an answer, by py3langid.

Why that one: its model of 140 languages lies inside a package of 4.6 MB that needs nothing but numpy, it is maintained,
and the same text always gets the same answer. docs/graders.md has the shares that it gets right.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

from py3langid.langid import MODEL_FILE, LanguageIdentifier
from pydantic import Field, field_validator

from vectors.evaluate.graders.contract import Answer, Grader, Tools, Verdict

# Languages that a short text is told apart from. A list of 140 gives every third short sentence to a rare one.
COMMON = ("ar", "cs", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nl", "no",
          "pl", "pt", "ro", "ru", "sv", "tr", "uk", "vi", "zh")


@lru_cache(maxsize=16)
def identifier(languages: tuple[str, ...]) -> Any:
    """An identifier that knows these languages only. Reading its model takes a second, so it is kept."""
    made = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    made.set_languages(list(languages))
    return made


@lru_cache(maxsize=1)
def known() -> frozenset[str]:
    """Codes of every language in the model."""
    return frozenset(LanguageIdentifier.from_model_file(MODEL_FILE).labels)


def language_of(text: str, languages: tuple[str, ...] = COMMON) -> tuple[str, float]:
    """ISO 639-1 code of the likeliest of `languages`, and how sure that is, 0 to 1."""
    code, share = identifier(languages).classify(text)
    return str(code), float(share)


class LanguageGrader(Grader):
    """Whether the answer is in a language. Text in two languages at once is broken, not half a success."""

    kind: Literal["language"] = "language"
    language: str = Field(description="ISO 639-1 code of the wanted language, fr say.")
    outcomes: ClassVar[tuple[str, ...]] = ("wanted", "other")

    @field_validator("language")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in known():
            raise ValueError(f"{value!r} is not one of the languages that are told apart: {', '.join(sorted(known()))}")
        return value

    def judge(self, answers: Sequence[Answer], tools: Tools) -> list[Verdict]:
        among = COMMON if self.language in COMMON else tuple(sorted({*COMMON, self.language}))
        return [self._one(*language_of(answer.text, among)) for answer in answers]

    def _one(self, found: str, share: float) -> Verdict:
        wanted = found == self.language
        return Verdict("wanted" if wanted else "other", wanted, (f"{found}, {share:.2f} sure",))
