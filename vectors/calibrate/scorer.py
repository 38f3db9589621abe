"""Scorers of target prompts: how much of the wanted behaviour there is at a strength."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from steering.language.fields import Model
from steering.programs.program import Program
from vectors.calibrate.bench import Bench, Trial
from vectors.extract.readout import ReadoutOptions, make_readout
from vectors.extract.subject import Tokens

Word = Annotated[str, Field(min_length=1, max_length=256)]
Words = Annotated[list[Word], Field(min_length=1, max_length=4096)]


class WordsScorer(Model):
    """Share of completions in which a word of `any` occurs and none of `none`. Whole words, whatever their case."""

    kind: Literal["words"] = "words"
    any: Words = Field(description="Words or phrases that count for the behaviour.")
    none: Annotated[list[Word], Field(max_length=4096)] = Field(default=[], description="Those that rule it out.")

    def score(self, trials: Sequence[Trial]) -> float:
        wanted, unwanted = _pattern(self.any), _pattern(self.none)
        hits = [bool(wanted.search(trial.text)) and not (self.none and unwanted.search(trial.text)) for trial in trials]
        return sum(hits) / len(hits)


class ReadoutScorer(ReadoutOptions):
    """Mean log-odds, in nats, of the first token of the answers that follow the prompt; nothing is generated."""

    kind: Literal["readout"] = "readout"


Scorer = Annotated[WordsScorer | ReadoutScorer, Field(discriminator="kind")]
Run = Callable[[Sequence[Tokens], Program | None], Sequence[Trial]]
# Of a program, and of the trials of the neutral prompts under it.
Score = Callable[[Program | None, Sequence[Trial]], float]


def make_score(scorer: WordsScorer | ReadoutScorer, bench: Bench, prompts: Sequence[Tokens] | None, run: Run,
               neutral: Sequence[Tokens], step: Callable[[], None]) -> Score:
    """The target score of a program.

    Args:
        prompts: of the behaviour; None where they are the neutral ones, whose trials then serve for both.
        run: completions of prompts under a program.
        step: called before each piece of work; it raises when the calibration is cancelled.

    Raises:
        NoContrast, EmptyText: see `make_readout`.
    """
    if isinstance(scorer, WordsScorer):
        words = scorer

        def by_words(program: Program | None, trials: Sequence[Trial]) -> float:
            step()
            return words.score(trials if prompts is None else run(prompts, program))

        return by_words
    readout = make_readout(scorer, bench)
    asked = neutral if prompts is None else prompts

    def by_readout(program: Program | None, trials: Sequence[Trial]) -> float:
        return float(readout.log_odds(asked, _every(step), program).mean())

    return by_readout


def _every(step: Callable[[], None]) -> Callable[[float], None]:
    return lambda share: step()


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
