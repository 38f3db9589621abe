"""The sweep: completions at every strength, sign and layer, beside those under random artifacts."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from steering.artifacts.source import Resolved, Source
from steering.language.errors import SteeringLimit, SteeringOverflow
from steering.language.intervention import Intervention
from steering.language.strength import Strength
from steering.ops import get_operation
from steering.programs.compiler import compile_program
from steering.programs.program import Applied, Program
from vectors.calibrate.bench import Bench, Trial
from vectors.calibrate.options import CalibrateOptions
from vectors.calibrate.placebo import random_like
from vectors.calibrate.refusals import CalibrationCancelled, CalibrationFailed
from vectors.calibrate.scorer import Score, make_score
from vectors.calibration import Floor, Outcome, Setting, Spread
from vectors.extract.contract import Cancelled, Progress
from vectors.extract.subject import Tokens, encoded
from vectors.extract.trial.effort import seconds

# Prompts of the search for the range of strengths, which needs no exact figures.
PILOT_PROMPTS = 8
MOST_DOUBLINGS = 10
HALVINGS = 2
# Shares of a change: ops that add no direction carry out between none and all of it.
LEAST_SHARE = 0.2
# The floor is a band over many draws: each needs fewer prompts and strengths than the curve itself.
FLOOR_PROMPTS = 16
FLOOR_POINTS = 5
DIGITS = 6
# What a strength fails with that the model's numbers, or the server's limit on steps, do not bear.
TOO_STRONG = (SteeringOverflow, SteeringLimit)
# Completions that run at once, and programs: each takes one of the engine's slots.
BATCH, MOST_AT_ONCE = 128, 8


def calibrate(source: Source, options: CalibrateOptions, bench: Bench, progress: Progress, cancelled: Cancelled
              ) -> list[Setting]:
    """Measure an artifact version in every setting asked for; the first has the placebo floor.

    Raises:
        CalibrationFailed: the artifact has no strength to vary or nothing moves. CalibrationCancelled.
        TrimtabError: the artifact does not fit the model, a prompt is empty or too long.
    """
    sweep = _Sweep(source, options, bench, progress, cancelled)
    chosen: list[list[int] | None] = [list(layers) for layers in options.layers] or [None]
    return [sweep.setting(layers, number, len(chosen)) for number, layers in enumerate(chosen)]


def estimated(options: CalibrateOptions, bench: Bench, sample: Tokens) -> float:
    """Seconds that a calibration will take, by how long the model needs for `sample` now."""
    prompts = [len(bench.encode(prompt)) for prompt in options.prompts]
    settings = max(len(options.layers), 1)
    # Each completion is written, and run again under the program and without it.
    of_all = (2 * options.points + 1) * settings
    of_some = options.draws * min(FLOOR_POINTS, options.points) * min(FLOOR_PROMPTS, len(prompts)) / len(prompts)
    tokens = (of_all + of_some) * sum(2 * length + 3 * options.max_tokens for length in prompts)
    return seconds(round(tokens), bench, sample)


@dataclass(frozen=True)
class _Place:
    """One setting: the layers asked for, what the compiler makes of them, and the raw strength to search from."""

    layers: list[int] | None
    applied: Applied
    start: float


class _Sweep:
    def __init__(self, source: Source, options: CalibrateOptions, bench: Bench, progress: Progress,
                 cancelled: Cancelled) -> None:
        self._source = source
        self._options = options
        self._bench = bench
        self._progress = progress
        self._cancelled = cancelled
        self._span = (0.0, 1.0)
        self._prompts = [encoded(bench, prompt, ("prompts", n)) for n, prompt in enumerate(options.prompts)]
        self._target_prompts: list[Tokens] = [] if options.target is None else [
            encoded(bench, prompt, ("target", "prompts", n)) for n, prompt in enumerate(options.target.prompts)]
        self._score = self._scorer(len(self._prompts))
        self._floor_score = self._scorer(FLOOR_PROMPTS)

    def setting(self, layers: list[int] | None, number: int, count: int) -> Setting:
        self._span = (number / count, (number + 1) / count)
        place = self._place(layers)
        adds = self._adds_direction(place)
        self._step(0.0, "range")
        base = self._outcome(0.0, None, self._prompts, self._score)
        strengths = self._options.strengths or (self._range(place) if adds else self._shares())
        sides: list[list[Outcome]] = []
        signs = (1, -1) if adds else (1,)
        for side, sign in enumerate(signs):
            self._step(0.05 + 0.35 * side / len(signs), "sweep")
            sides.append(self._outcomes([(strength, self._program(self._source, place.layers, sign * strength))
                                         for strength in strengths], self._prompts, self._score))
        if max(point.kl for point in sides[0]) <= 0:
            raise CalibrationFailed("no strength moves the output at all", param="name",
                                    fix="Check the scope, and that the artifact acts at these layers.")
        floor = self._floor(place, strengths) if number == 0 else []
        facts = self._bench.facts
        return Setting(
            fingerprint=facts.fingerprint, model_id=facts.model_id, op=place.applied.op, sites=place.applied.sites,
            layers=place.applied.layers, options=dict(place.applied.options), scope=self._options.scope, base=base,
            up=tuple(sides[0]), down=tuple(sides[1]) if len(sides) > 1 else (), floor=tuple(floor),
            draws=self._options.draws if floor else 0, prompts=len(self._prompts),
            target_prompts=len(self._target_prompts), max_tokens=self._options.max_tokens,
            temperature=self._options.temperature, seed=self._options.seed)

    def _place(self, layers: list[int] | None) -> _Place:
        applied = self._program(self._source, layers, None).compiled[0].applied
        scales = [abs(scale) for scale in applied.strength["scale"].values() if scale]
        return _Place(layers, applied, scales[0] if scales else 1.0)

    def _adds_direction(self, place: _Place) -> bool:
        return get_operation(place.applied.op).adds_direction

    def _program(self, source: Source, layers: list[int] | None, strength: float | None) -> Program:
        """strength: raw; None for the artifact's own."""
        fields: dict[str, Any] = {"artifact": source.ref, "scope": self._options.scope,
                                  "options": self._options.options}
        if layers is not None:
            fields["layers"] = layers
        if strength is not None:
            fields["strength"] = Strength(value=strength)
        return compile_program([Resolved(Intervention(**fields), source)], self._bench.facts)

    def _range(self, place: _Place) -> list[float]:
        """Strengths, evenly spaced in their logarithm, whose KL covers `reach` as far as doubling gets there."""
        low, high = self._options.reach
        pilot = self._prompts[:PILOT_PROMPTS]

        def kl(strength: float) -> float:
            self._step(0.02, "range")
            program = self._program(self._source, place.layers, strength)
            try:
                found = _mean([trial.kl for trial in self._trials(pilot, program)])
            except TOO_STRONG:
                # Beyond every dose, and no strength to sweep at.
                return math.inf
            borne.append(strength)
            return found

        borne: list[float] = []
        first = last = place.start
        begin = end = kl(place.start)
        for _ in range(MOST_DOUBLINGS):
            if begin <= low:
                break
            first /= 2
            begin = kl(first)
        for _ in range(MOST_DOUBLINGS):
            if end >= high:
                break
            last *= 2
            end = kl(last)
        # Points beyond the reach would be spent where nothing is asked for: halve what the last doubling overshot.
        for _ in range(HALVINGS):
            middle = math.sqrt(last * max(last / 2, first))
            if end >= high and kl(middle) >= high:
                last = middle
            middle = math.sqrt(first * min(first * 2, last))
            if begin <= low and kl(middle) <= low:
                first = middle
        last = min(last, max(borne, default=0.0))
        if first >= last:
            raise CalibrationFailed(f"doses of {low:g} to {high:g} nats lie between no two strengths", param="reach",
                                    fix="Give the strengths.")
        return _spaced(first, last, self._options.points)

    def _shares(self) -> list[float]:
        return _spaced(LEAST_SHARE, 1.0, self._options.points)

    def _floor(self, place: _Place, strengths: Sequence[float]) -> list[Floor]:
        draws = [replace(self._source, ref=f"random@{n + 1}", digest="",
                         payload=random_like(self._source.payload, self._bench.facts, place.applied.sites[0],
                                             self._options.seed + n)) for n in range(self._options.draws)]
        some = self._prompts[:FLOOR_PROMPTS]
        chosen = [strengths[i] for i in _picked(len(strengths), FLOOR_POINTS)]
        found = []
        for i, strength in enumerate(chosen):
            self._step(0.4 + 0.6 * i / len(chosen), "placebo")
            outcomes = self._outcomes([(strength, self._program(draw, place.layers, strength)) for draw in draws], some,
                                      self._floor_score)
            found.append(Floor(
                strength=strength, kl=_spread([o.kl for o in outcomes]),
                perplexity=_spread([o.perplexity for o in outcomes]),
                repetition=_spread([o.repetition for o in outcomes]),
                target=None if self._floor_score is None else _spread([o.target for o in outcomes
                                                                       if o.target is not None])))
        return found

    def _outcomes(self, programs: Sequence[tuple[float, Program]], prompts: Sequence[Tokens], score: Score | None
                  ) -> list[Outcome]:
        """In the order of `programs`, each with its strength; some run at once, to fill the engine's batches."""
        with ThreadPoolExecutor(min(max(BATCH // len(prompts), 1), MOST_AT_ONCE)) as pool:
            return list(pool.map(lambda item: self._outcome(item[0], item[1], prompts, score), programs))

    def _outcome(self, strength: float, program: Program | None, prompts: Sequence[Tokens], score: Score | None
                 ) -> Outcome:
        self._check()
        try:
            trials = self._trials(prompts, program)
        except TOO_STRONG as error:
            raise CalibrationFailed(f"strength {strength:g} is more than the model bears: {error.message}",
                                    param="strengths" if self._options.strengths else "reach",
                                    fix="Ask for less.") from error
        kl = [trial.kl for trial in trials]
        mean = _mean(kl)
        spread = math.sqrt(sum((x - mean) ** 2 for x in kl) / max(len(kl) - 1, 1) / len(kl))
        tokens = sum(trial.length for trial in trials)
        surprise = sum(trial.surprise * trial.length for trial in trials) / tokens
        numbers: dict[str, float] = {
            "kl": mean, "kl_error": spread, "perplexity": math.exp(min(surprise, 80.0)),
            "repetition": _mean([trial.repetition for trial in trials]),
            "compression": _mean([trial.compression for trial in trials]), "length": tokens / len(trials),
            "ended": _mean([float(trial.ended) for trial in trials])}
        return Outcome(strength=strength, target=None if score is None else round(score(program, trials), DIGITS),
                       **{name: round(value, DIGITS) for name, value in numbers.items()})

    def _trials(self, prompts: Sequence[Tokens], program: Program | None) -> list[Trial]:
        options = self._options
        return self._bench.trials(prompts, program, options.max_tokens, options.temperature, options.seed)

    def _scorer(self, most: int) -> Score | None:
        """Of the first `most` prompts of either kind."""
        target = self._options.target
        if target is None:
            return None
        own = None if self._target_prompts == self._prompts else self._target_prompts[:most]
        return make_score(target.scorer, self._bench, own, self._trials, self._prompts[:most], self._check)

    def _check(self) -> None:
        if self._cancelled():
            raise CalibrationCancelled("the calibration was cancelled")

    def _step(self, share: float, stage: str) -> None:
        self._check()
        start, stop = self._span
        self._progress(start + (stop - start) * share, stage)


def _spaced(first: float, last: float, count: int) -> list[float]:
    """From first to last, evenly in the logarithm, to six digits: what a card holds is what was measured."""
    ratio = math.log(last / first) / (count - 1)
    return [float(f"{first * math.exp(ratio * i):.6g}") for i in range(count)]


def _picked(length: int, count: int) -> list[int]:
    """Up to `count` indices, evenly from the first to the last."""
    if length <= count:
        return list(range(length))
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Spread(low=ordered[0], median=round(median, DIGITS), high=ordered[-1])
