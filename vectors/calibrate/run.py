"""The sweep: completions at every strength, sign and layer, beside those under random artifacts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from steering.artifacts.dose import canonical, canonical_scope
from steering.artifacts.source import Resolved, Source
from steering.language.intervention import Intervention
from steering.language.strength import Strength
from steering.ops import get_operation
from steering.programs.compiler import compile_program
from steering.programs.program import Applied, Program
from vectors.calibrate.bench import Bench
from vectors.calibrate.known import Known
from vectors.calibrate.measured import DIGITS, DRAW_MOST, PILOT_PROMPTS, TOO_STRONG, Measured, mean
from vectors.calibrate.options import CalibrateOptions
from vectors.calibrate.placebo import random_like
from vectors.calibrate.refusals import CalibrationCancelled, CalibrationFailed
from vectors.calibrate.seek import Seeker
from vectors.calibration import Floor, Outcome, Setting, Spread
from vectors.extract.contract import Cancelled, Progress
from vectors.extract.subject import Tokens
from vectors.extract.trial.effort import seconds

# Shares of a change: ops that add no direction carry out between none and all of it.
LEAST_SHARE = 0.2
# The floor is a band, and has fewer strengths than the curve: its middle and its end, as small ones do little.
FLOOR_POINTS = 2


def calibrate(source: Source, options: CalibrateOptions, bench: Bench, progress: Progress, cancelled: Cancelled,
              former: Sequence[Setting] = (), known: Known | None = None) -> list[Setting]:
    """Measure an artifact version in every setting asked for; the first has the placebo floor.

    Args:
        former: settings of the artifact's card, to be extended where the options ask for that.
        known: completions that an equal calibration made which did not end.

    Raises:
        CalibrationFailed: the artifact has no strength to vary, nothing moves, or there is nothing to extend.
        CalibrationCancelled. TrimtabError: the artifact does not fit the model, a prompt is empty or too long.
    """
    sweep = _Sweep(source, options, bench, progress, cancelled, former, known or Known())
    chosen: list[list[int] | None] = [list(layers) for layers in options.layers] or [None]
    return [sweep.setting(layers, number, len(chosen)) for number, layers in enumerate(chosen)]


def estimated(options: CalibrateOptions, bench: Bench, sample: Tokens) -> float:
    """Seconds that a calibration will take, by how long the model needs for `sample` now."""
    lengths = [len(bench.encode(prompt)) for prompt in options.prompts]
    settings = max(len(options.layers), 1)
    # Each completion is written, and its tokens are run again without the program.
    of_all = (2 * options.points + 1) * settings
    of_some = options.draws * FLOOR_POINTS * min(DRAW_MOST, len(lengths)) / (2 * len(lengths))
    tokens = (of_all + of_some) * sum(length + 2 * options.max_tokens for length in lengths)
    return seconds(round(tokens), bench, sample)


@dataclass(frozen=True)
class _Place:
    """One setting: the layers asked for, what the compiler makes of them, and the raw strength to search from."""

    layers: list[int] | None
    applied: Applied
    start: float


class _Sweep:
    def __init__(self, source: Source, options: CalibrateOptions, bench: Bench, progress: Progress,
                 cancelled: Cancelled, former: Sequence[Setting], known: Known) -> None:
        self._source = source
        self._options = options
        self._bench = bench
        self._progress = progress
        self._cancelled = cancelled
        self._former = former
        self._span = (0.0, 1.0)
        self._measured = Measured(options, bench, known, self._check)

    def setting(self, layers: list[int] | None, number: int, count: int) -> Setting:
        self._span = (number / count, (number + 1) / count)
        self._step(0.0, "range")
        place = self._place(layers)
        former = self._extended(place) if self._options.extend else None
        signs = (1, -1) if get_operation(place.applied.op).adds_direction else (1,)
        strengths = self._strengths(place, former)
        base = self._measured.untouched() if former is None else former.base
        sides: list[list[Outcome]] = []
        for side, sign in enumerate(signs):
            self._step(0.05 + 0.35 * side / len(signs), "sweep")
            sides.append(self._measured.curve([(strength, self._program(self._source, place.layers, sign * strength))
                                               for strength in strengths]))
        if former is not None:
            sides = [sorted([*old, *new], key=lambda point: point.strength)
                     for old, new in zip((former.up, former.down), sides, strict=False)]
        if max(point.kl for point in sides[0]) <= 0:
            raise CalibrationFailed("no strength moves the output at all", param="name",
                                    fix="Check the scope, and that the artifact acts at these layers.")
        floor = self._floor(place, strengths, former) if number == 0 else []
        facts, options = self._bench.facts, self._options
        return Setting(
            fingerprint=facts.fingerprint, model_id=facts.model_id, op=place.applied.op, sites=place.applied.sites,
            layers=place.applied.layers, options=dict(place.applied.options), scope=options.scope, base=base,
            up=tuple(sides[0]), down=tuple(sides[1]) if len(sides) > 1 else (), floor=tuple(floor),
            draws=options.draws if floor else 0, prompts=self._measured.count("neutral"),
            target_prompts=self._measured.count("target"), prompts_digest=self._measured.digest,
            max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed)

    # Where to measure.

    def _place(self, layers: list[int] | None) -> _Place:
        applied = self._program(self._source, layers, None).compiled[0].applied
        scales = [abs(scale) for scale in applied.strength["scale"].values() if scale]
        return _Place(layers, applied, scales[0] if scales else 1.0)

    def _program(self, source: Source, layers: list[int] | None, strength: float | None) -> Program:
        """strength: raw; None for the artifact's own."""
        fields: dict[str, Any] = {"artifact": source.ref, "scope": self._options.scope,
                                  "options": self._options.options}
        if layers is not None:
            fields["layers"] = layers
        if strength is not None:
            fields["strength"] = Strength(value=strength)
        return compile_program([Resolved(Intervention(**fields), source)], self._bench.facts)

    def _extended(self, place: _Place) -> Setting:
        """The setting of the card that is to be extended. Its figures are joined with new ones, so they must have been
        measured in the same way."""
        applied, options = place.applied, self._options
        key = (applied.op, applied.sites, applied.layers, canonical(dict(applied.options)),
               canonical_scope(options.scope))
        found = next((one for one in self._former if one.key == key
                      and one.fingerprint == self._bench.facts.fingerprint), None)
        if found is None:
            raise CalibrationFailed("there is no curve of this setting to extend", param="extend",
                                    fix="Leave extend out.")
        same = {"prompts": found.prompts_digest == self._measured.digest,
                "max_tokens": found.max_tokens == options.max_tokens,
                "temperature": found.temperature == options.temperature, "seed": found.seed == options.seed,
                "draws": found.draws in (0, options.draws)}
        for name, equal in same.items():
            if not equal:
                raise CalibrationFailed(f"the curve to be extended was measured with other {name}", param=name,
                                        fix="Give what it was measured with, or leave extend out.")
        return found

    def _strengths(self, place: _Place, former: Setting | None) -> list[float]:
        """Strengths to measure, rising."""
        if not get_operation(place.applied.op).adds_direction:
            if former is not None:
                raise CalibrationFailed(f"the op {place.applied.op} carries out its whole change already, so "
                                        "the curve cannot go further", param="extend", fix="Leave extend out.")
            return list(self._options.strengths) or _spaced(LEAST_SHARE, 1.0, self._options.points)
        if self._options.strengths:
            measured = set() if former is None else {point.strength for point in former.up}
            return [strength for strength in self._options.strengths if strength not in measured]
        return self._found(place) if former is None else self._beyond(place, former)

    def _found(self, place: _Place) -> list[float]:
        """Strengths, evenly spaced in their logarithm, between which the doses of `reach` lie."""
        low, high = self._options.reach
        seeker = Seeker(lambda strength: self._pilot(place, strength), place.start)
        first, last = seeker.below(low), seeker.above(high)
        if first is None or last is None or first >= last:
            raise CalibrationFailed(f"doses of {low:g} to {high:g} nats cannot be found between any two "
                                    "strengths", param="reach", fix="Give the strengths.")
        return _spaced(first, last, self._options.points)

    def _beyond(self, place: _Place, former: Setting) -> list[float]:
        """The same for the doses that the curve of `former` does not have, as closely spaced as that."""
        ends, found = (former.up[0], former.up[-1]), list[float]()
        ratio = (ends[1].strength / ends[0].strength) ** (1 / (len(former.up) - 1))
        for end, dose, sign in zip(ends, self._options.reach, (-1, 1), strict=True):
            if (end.kl - dose) * sign >= 0:
                continue
            seeker = Seeker(lambda strength: self._pilot(place, strength), end.strength,
                            {point.strength: point.kl for point in former.up})
            reached = seeker.above(dose) if sign > 0 else seeker.below(dose)
            if reached is None or (reached - end.strength) * sign <= 0:
                continue
            steps = max(round(abs(math.log(reached / end.strength)) / math.log(ratio)), 1)
            found += _spaced(end.strength, reached, steps + 1)[1:]
        if not found:
            raise CalibrationFailed("the curve covers these doses already, or the model's text breaks before it "
                                    "reaches them", param="reach", fix="Ask for doses beyond it.")
        return sorted(found)

    def _pilot(self, place: _Place, strength: float) -> float:
        """KL on a few prompts; infinite beyond what the model bears."""
        self._step(0.02, "range")
        try:
            program = self._program(self._source, place.layers, strength)
            return mean([trial.kl for trial in self._measured.trials([program], PILOT_PROMPTS)[0]])
        except TOO_STRONG:
            return math.inf

    def _floor(self, place: _Place, strengths: Sequence[float], former: Setting | None) -> list[Floor]:
        draws = [replace(self._source, ref=f"random@{n + 1}", digest="",
                         payload=random_like(self._source.payload, self._bench.facts, place.applied.sites[0],
                                             self._options.seed + n)) for n in range(self._options.draws)]
        # Of a curve that is extended, the floor is extended to its new ends.
        middle, end = strengths[len(strengths) // 2], strengths[-1]
        chosen = sorted({middle, end}) if former is None else [end if end > former.up[-1].strength else strengths[0]]
        found = [] if former is None else list(former.floor)
        for i, strength in enumerate(chosen):
            self._step(0.4 + 0.6 * i / len(chosen), "placebo")
            programs = [self._program(draw, place.layers, strength) for draw in draws]
            count = self._measured.draws(strength, programs)
            outcomes = [self._measured.outcome(strength, program, count) for program in programs]
            found.append(Floor(
                strength=strength, prompts=count, kl=_spread([o.kl for o in outcomes]),
                perplexity=_spread([o.perplexity for o in outcomes]),
                repetition=_spread([o.repetition for o in outcomes]),
                target=None if self._options.target is None else _spread([o.target for o in outcomes
                                                                         if o.target is not None])))
        return sorted(found, key=lambda row: row.strength)

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


def _spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Spread(low=ordered[0], median=round(median, DIGITS), high=ordered[-1])
