"""Sentiment of an English answer, by VADER's lexicon and rules (Hutto and Gilbert 2014): made by others, for other
texts, so that a vector cannot have been fitted to it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pydantic import Field
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from vectors.evaluate.graders.contract import Answer, Grader, Tools, Verdict
from vectors.evaluate.graders.words import sentences

# VADER's own borders between the three.
POLAR = 0.05


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    return SentimentIntensityAnalyzer()


def polarity(text: str) -> float:
    """-1 to 1: the mean over sentences, as VADER is made for short texts; those without any feeling do not count."""
    scores = [_analyzer().polarity_scores(sentence)["compound"] for sentence in sentences(text)]
    felt = [score for score in scores if score != 0]
    return sum(felt) / len(felt) if felt else 0.0


class SentimentGrader(Grader):
    """positive, negative or neutral. English only."""

    kind: Literal["sentiment"] = "sentiment"
    wanted: Literal["positive", "negative", "neutral"] = Field(default="positive",
                                                               description="The outcome that is a success.")
    outcomes: ClassVar[tuple[str, ...]] = ("positive", "negative", "neutral")

    def judge(self, answers: Sequence[Answer], tools: Tools) -> list[Verdict]:
        return [self._one(polarity(answer.text)) for answer in answers]

    def _one(self, score: float) -> Verdict:
        outcome = "positive" if score >= POLAR else "negative" if score <= -POLAR else "neutral"
        return Verdict(outcome, outcome == self.wanted, (f"polarity {score:+.2f}",))
