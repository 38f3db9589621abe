"""What is measured of programs: completions of the prompts, as many as the precision asks for, and their means."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Literal

from steering.language.errors import SteeringLimit, SteeringOverflow, TrimtabError
from steering.programs.program import Program
from vectors.calibrate.bench import Bench, Trial
from vectors.calibrate.known import Known
from vectors.calibrate.options import CalibrateOptions
from vectors.calibrate.refusals import CalibrationFailed
from vectors.calibrate.scorer import Score, make_score
from vectors.calibration import Outcome
from vectors.extract.subject import Tokens, encoded

# Prompts of the search for the range of strengths, which needs no exact figures, and of the first look at a strength.
PILOT_PROMPTS = 8
# Of a random draw: the first number of prompts, doubled up to the last one until the mean KL of all draws is known to
# this relative standard error.
DRAW_PROMPTS, DRAW_MOST, DRAW_PRECISION = 4, 16, 0.15
DIGITS = 6
# What a strength fails with that the model's numbers, or the server's limit on steps, do not bear.
TOO_STRONG = (SteeringOverflow, SteeringLimit)
# Completions between two looks at whether the calibration is still wanted; what is known of them is kept.
BATCH = 64
Kind = Literal["neutral", "target"]


class Measured:
    """
    Args:
        known: completions of before; those that are made here are added.
        check: called between batches; it raises when the calibration is cancelled.

    Attributes:
        digest: of all prompts.
    """

    def __init__(self, options: CalibrateOptions, bench: Bench, known: Known, check: Callable[[], None]) -> None:
        self._options, self._bench, self._known, self._check = options, bench, known, check
        self._prompts: dict[Kind, list[Tokens]] = {
            "neutral": [encoded(bench, prompt, ("prompts", n)) for n, prompt in enumerate(options.prompts)],
            "target": [] if options.target is None else [
                encoded(bench, prompt, ("target", "prompts", n)) for n, prompt in enumerate(options.target.prompts)]}
        self.digest = hashlib.sha256(json.dumps(self._prompts).encode()).hexdigest()

    def count(self, kind: Kind) -> int:
        return len(self._prompts[kind])

    def untouched(self) -> Outcome:
        return self._outcome(0.0, None, self.trials([None], self.count("neutral"))[0])

    def curve(self, wanted: Sequence[tuple[float, Program]]) -> list[Outcome]:
        """Of each strength and its program, on all prompts or as many as tell its KL precisely enough.

        Raises:
            CalibrationFailed: naming a strength that the model does not bear.
        """
        everything = self.count("neutral")
        count, left = min(PILOT_PROMPTS, everything), list(wanted)
        while left:
            self._bear(left, count)
            if count == everything:
                break
            left = [(strength, program) for strength, program in left if self._options.target is not None
                    or not precise(self._known.of(program.digest), self._options.precision)]
            count = min(2 * count, everything)
        return [self.outcome(strength, program) for strength, program in wanted]

    def draws(self, strength: float, programs: Sequence[Program]) -> int:
        """Measure random draws on as many prompts as tell their mean KL precisely enough; how many that were."""
        most = min(DRAW_MOST, self.count("neutral"))
        count = min(DRAW_PROMPTS, most)
        while True:
            self._bear([(strength, program) for program in programs], count)
            of_draws = [[trial.kl for trial in self._known.of(program.digest)[:count]] for program in programs]
            if count == most or (self._options.target is None and even(of_draws, DRAW_PRECISION,
                                                                                     self._options.reach[0])):
                return count
            count = min(2 * count, most)

    def outcome(self, strength: float, program: Program, count: int | None = None) -> Outcome:
        """Means over what was measured of a program, or over its first `count` prompts."""
        return self._outcome(strength, program, self._known.of(program.digest)[:count], count)

    def trials(self, programs: Sequence[Program | None], count: int, kind: Kind = "neutral") -> list[list[Trial]]:
        """Completions of the first `count` prompts under each program. What is not known yet is made in batches of
        whatever is missing; the completion of a prompt is drawn with the same seed everywhere."""
        prompts = self._prompts[kind]
        names = [f"{'target ' if kind == 'target' else ''}{'untouched' if one is None else one.digest}"
                 for one in programs]
        missing = [(names[n], program, i) for n, program in enumerate(programs)
                   for i in range(len(self._known.of(names[n])), min(count, len(prompts)))]
        for start in range(0, len(missing), BATCH):
            self._check()
            part = missing[start:start + BATCH]
            found = self._bench.trials([prompts[i] for _, _, i in part], [program for _, program, _ in part],
                                       self._options.max_tokens, self._options.temperature,
                                       [self._options.seed + i for _, _, i in part])
            made: dict[str, list[Trial]] = {}
            for (name, _, _), trial in zip(part, found, strict=True):
                made.setdefault(name, []).append(trial)
            self._known.add(list(made.items()))
        return [list(self._known.of(name)[:count]) for name in names]

    def _bear(self, wanted: Sequence[tuple[float, Program]], count: int) -> None:
        """Measure programs on the first prompts. Raises CalibrationFailed, naming the strength that the model does not
        bear."""
        try:
            self.trials([program for _, program in wanted], count)
        except TOO_STRONG:
            # One of them: which it is, is told by each alone.
            for strength, program in wanted:
                try:
                    self.trials([program], count)
                except TOO_STRONG as error:
                    raise self._too_much(strength, error) from error

    def _too_much(self, strength: float, error: TrimtabError) -> CalibrationFailed:
        return CalibrationFailed(f"strength {strength:g} is more than the model bears: {error.message}",
                                 param="strengths" if self._options.strengths else "reach", fix="Ask for less.")

    def _outcome(self, strength: float, program: Program | None, trials: Sequence[Trial], count: int | None = None
                 ) -> Outcome:
        kl, error = mean_and_error([trial.kl for trial in trials])
        tokens = sum(trial.length for trial in trials)
        surprise = sum(trial.surprise * trial.length for trial in trials) / tokens
        numbers: dict[str, float] = {
            "kl": kl, "kl_error": error, "perplexity": math.exp(min(surprise, 80.0)),
            "repetition": mean([trial.repetition for trial in trials]),
            "compression": mean([trial.compression for trial in trials]), "length": tokens / len(trials),
            "ended": mean([float(trial.ended) for trial in trials])}
        score = self._scorer(count)
        return Outcome(strength=strength, target=None if score is None else round(score(program, trials), DIGITS),
                       completions=len(trials) if len(trials) < self.count("neutral") else None,
                       **{name: round(value, DIGITS) for name, value in numbers.items()})

    def _scorer(self, most: int | None) -> Score | None:
        """Of the first `most` prompts of either kind."""
        target = self._options.target
        if target is None:
            return None
        own = None if self._prompts["target"] == self._prompts["neutral"] else self._prompts["target"][:most]
        return make_score(target.scorer, self._bench, own,
                          lambda prompts, program: self.trials([program], len(prompts), "target")[0],
                          self._prompts["neutral"][:most], self._check)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    middle = mean(values)
    return middle, math.sqrt(sum((x - middle) ** 2 for x in values) / max(len(values) - 1, 1) / len(values))


def precise(trials: Sequence[Trial], precision: float) -> bool:
    middle, error = mean_and_error([trial.kl for trial in trials])
    return error <= precision * middle


def even(kl: Sequence[Sequence[float]], precision: float, least: float) -> bool:
    """Whether the mean of `kl[draw][prompt]` has this relative standard error, over draws and prompts together; of one
    below `least` it need not be smaller than that of `least`."""
    middle, of_draws = mean_and_error([mean(row) for row in kl])
    of_prompts = mean_and_error([mean(column) for column in zip(*kl, strict=True)])[1]
    return math.hypot(of_draws, of_prompts) <= precision * max(middle, least)
