"""Whether a text is whole: language that can be read, as opposed to word salad, a loop, languages mixed up, or nothing.

Rules look at the text alone; surprise under the untouched model sees what they cannot. A text that was cut off by a
limit is whole, one that is wrong or off its subject too: that is for other graders. The limits were chosen on the texts
of part "fit" in tests/data/graded_texts.jsonl, labelled by hand; docs/graders.md has the shares right on the others.
"""

import re
from collections import Counter
from collections.abc import Sequence

from vectors.evaluate.graders.contract import Answer, Tools
from vectors.evaluate.graders.language import language_of
from vectors.evaluate.graders.lexicon import COMMON_LISTS, has_words, knows, parts
from vectors.evaluate.graders.words import words

# Nats per token over what the untouched model's own answers have.
MOST_SURPRISE = 1.0
# Three words in a row that stood there before, as a share of all such triples; a refrain is no loop.
LOOP_WORDS, MOST_REPEATED = 10, 0.34
# The end says the same again and again.
LOOPED_END = re.compile(r"(.{2,60}?)\1{3,}\W*\Z", re.DOTALL)
LOOPED_SYLLABLES = re.compile(r"(\w{2,6})\1{3,}")
# Marks that prose does not have inside of words or in a row.
GLUED = re.compile(r"[!?,;:)\]}]{1,3}[^\W\d_]{2,}|[^\W\d_]{2,}\d+(?![\w%°])|[a-zà-ÿ]{2,}[A-ZÀ-Ý][a-zà-ÿ]|\ufffd"
                   r"|[^\W\d_]+_[^\W\d_]+|[!?]{2,}[^\s\"'”’)!?]")
MOST_GLUED = 0.05
MOST_MARKS = 0.34
LONGEST_WORD = 30
# Shares of the words that are of another language, or of none. Fewer words than this tell nothing.
FEW_WORDS = 4
MOST_MOVED, MOST_STRANGE = 0.1, 0.15
_NAME = re.compile(r"(?:(?<=[^\W\d_] )|(?<=, ))[A-ZÀ-Þ]\w+")
SURE, LONG_WORD = 0.8, 5
# More names than that are no sentence.
MOST_NAMES = 0.5


def faults(answers: Sequence[Answer], tools: Tools, *, prose: bool = True) -> list[list[str]]:
    """Why each answer is broken; an empty list for one that is whole.

    prose: answers are sentences. Without that, only emptiness, loops and surprise count: JSON is no sentence.
    """
    found = [_of_text(answer.text, prose) for answer in answers]
    if tools.surprise is not None and answers:
        limit = tools.usual_surprise + MOST_SURPRISE
        for reasons, surprise in zip(found, tools.surprise(answers), strict=True):
            if surprise > limit:
                reasons.append(f"the untouched model finds it unlikely: {surprise:.1f} nats a token, over {limit:.1f}")
    return found


def _of_text(text: str, prose: bool) -> list[str]:
    said = words(text)
    if not (said if prose else text.strip()):
        return ["there are no words"]
    rules = [_loop(text, said)]
    if prose:
        rules += [_marks(text, said), _foreign(text)]
    return [reason for reason in rules if reason]


def _loop(text: str, said: Sequence[str]) -> str | None:
    looped = LOOPED_END.search(text[-400:]) or LOOPED_SYLLABLES.search(text)
    if looped and any(c.isalnum() for c in looped.group(1)):
        return f"repeats {looped.group(1).strip()!r} again and again"
    triples = [tuple(said[i:i + 3]) for i in range(len(said) - 2)]
    if len(said) >= LOOP_WORDS:
        share = 1 - len(set(triples)) / len(triples)
        if share > MOST_REPEATED:
            return f"{share:.0%} of its word triples stood there before"
        word, count = Counter(said).most_common(1)[0]
        if count > len(said) / 2:
            return f"every other word is {word!r}"
    return None


def _marks(text: str, said: Sequence[str]) -> str | None:
    longest = max(said, key=len)
    if len(longest) > LONGEST_WORD:
        return f"a word of {len(longest)} letters"
    glued = GLUED.findall(text)
    if len(glued) > max(1.0, MOST_GLUED * len(said)) or (glued and len(said) < 8):
        return f"words and marks run into each other: {glued[0]!r}"
    solid = [c for c in text if not c.isspace()]
    share = sum(not c.isalnum() for c in solid) / len(solid)
    if share > MOST_MARKS:
        return f"{share:.0%} of it are marks"
    return None


def _foreign(text: str) -> str | None:
    """Words that are none of the text's language: made up, or of another one. Names, which nobody lists, begin with a
    capital inside of a sentence and are left out."""
    language, share = language_of(text)
    if not has_words(language) or (language not in COMMON_LISTS and share < SURE):
        return None
    looked_up = parts(text)
    names = set() if language == "de" else set(_NAME.findall(text))
    rest = [part for part in looked_up if part not in names]
    if len(looked_up) - len(rest) <= MOST_NAMES * len(looked_up):
        looked_up = rest
    strange = [part for part in looked_up if not knows(language, part)]
    if len(looked_up) < FEW_WORDS or not strange:
        return None
    elsewhere = language_of(" ".join(strange), tuple(code for code in COMMON_LISTS if code != language))[0]
    moved = [part for part in strange if knows(elsewhere, part)]
    # One short word may be a gap in a list; a long one, or two, are none.
    if len(moved) > MOST_MOVED * len(looked_up) and (len(moved) > 1 or len(moved[0]) >= LONG_WORD):
        return f"{language} mixed with {elsewhere}: {', '.join(moved[:4])}"
    if len(strange) > max(1, MOST_STRANGE * len(looked_up)):
        return f"{len(strange)} of {len(looked_up)} words are not {language}: {', '.join(strange[:4])}"
    return None
