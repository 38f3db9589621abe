"""The trial itself: from many candidates to one default, or to the verdict that nothing works.

1. Untouched: all questions are answered as ever.
2. First order: every layer of the grid is steered at one moderate step, and the pairs' own continuations are scored;
   the most promising places go on, the best one also with its neighbours as a band of layers, and turned round.
3. Scouting: each place answers some questions at strengths spaced evenly in their logarithm.
4. Refining: the best place answers all questions at strengths around its best one. From these follow the band and the
   default in its middle.
5. Random vectors of equal length answer at the default.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vectors.extract.standing import random_like, rounded
from vectors.extract.subject import Subject
from vectors.extract.trial import classifier
from vectors.extract.trial.bench import Asked, Bench, asked_at
from vectors.extract.trial.effort import BUDGETS, REFINED, SCORED_TOKENS, Budget
from vectors.extract.trial.plan import TrialPlan
from vectors.extract.trial.surface import Arm, Place, band_of, verdict
from vectors.extract.work import Span

# Layers outside of these shares of the depth only spell or read out.
SHALLOWEST, DEEPEST = 0.1, 0.9
# A classifier that knows the sides worse than this is no grader.
LEAST_ACCURACY = 0.75
# Shares of the activations' length: the step of the first-order effect, and the ends of the scale that is scouted.
PROBE, SMALLEST, LARGEST = 0.3, 0.12, 0.9
# A band takes this share of the model's layers.
WIDTH = 0.12


@dataclass(frozen=True)
class Tried:
    """What a trial found. place: None where there is nothing to tell a success by. strength: raw, of the default, or of
    the best that was tried. draft: why what was made is no finished artifact."""

    place: Place | None
    strength: float
    draft: str | None
    card: dict[str, Any]


def run(plan: TrialPlan, subject: Subject, generator: torch.Generator, span: Span) -> Tried:
    """Raises:
        ExtractionCancelled. TrimtabError: the grader fails, or a vector does not fit.
    """
    budget = BUDGETS[plan.options.effort]
    made = None if plan.grader is not None else classifier.fit(subject, plan.positive, plan.negative, span.part(0, 12))
    if made is not None and made.accuracy < LEAST_ACCURACY:
        draft = (f"the positive and the negative texts of the pairs cannot be told apart: a classifier is right on "
                 f"{made.accuracy:.0%} of those it was not fitted on, {LEAST_ACCURACY:.0%} are needed to tell by it "
                 "what steering did")
        return Tried(None, 1.0, draft, {"effort": plan.options.effort, "completions": 0,
                                        "grader": {"kind": "pairs", "accuracy": made.accuracy}})
    bench = Bench(plan, subject, budget.tokens, plan.grader, made)
    questions = plan.questions[:budget.prompts]
    some = questions[:budget.scout]
    base = bench.untouched(questions, span.part(1, 12))
    # Scouting sees some of the questions only, and is compared with the untouched answers to all of them.
    places, effects = _places(plan, bench, budget, _parts(span, 2, 5))
    asked = [asked_at(place, plan, share, some) for place in places for share in _scale(budget)]
    arms = bench.arms(asked, _parts(span, 5, 8))
    scouted = {place: arms[n * budget.strengths:(n + 1) * budget.strengths] for n, place in enumerate(places)}
    place = max(places, key=lambda one: max(arm.worth(base) for arm in scouted[one]))
    best = max(scouted[place], key=lambda arm: arm.worth(base))
    refined = _refined(bench, plan, place, best, questions, _parts(span, 8, 10))
    band = band_of(refined, base)
    top = max(refined, key=lambda arm: arm.worth(base))
    chosen = top if band is None else min(refined, key=lambda arm: abs(math.log(arm.strength / band.default)))
    random = _random(bench, plan, place, chosen, budget, some, generator, _parts(span, 10, 12))
    return Tried(place, chosen.strength, verdict(chosen, base, random), {
        "effort": plan.options.effort, "completions": bench.written, "questions": len(questions),
        "grader": _graded_by(plan, bench), "place": place.name, "layers": list(place.layers),
        "untouched": _told(base), "default": _told(chosen),
        "band": None if band is None else {"low": rounded(band.low), "high": rounded(band.high)},
        "effects": effects, "scouted": [{"place": one.name, "layers": list(one.layers), "sign": one.sign,
                                         "arms": [arm.as_dict() for arm in scouted[one]]} for one in places],
        "surface": [arm.as_dict() for arm in refined],
        "random": {"draws": len(random), "success": [round(arm.success, 4) for arm in random],
                   "broken": [round(arm.broken, 4) for arm in random],
                   **({"sample": _told(random[0])["sample"]} if random else {})}})


def _parts(span: Span, first: int, last: int) -> Span:
    width = (span.stop - span.start) / 12
    return replace(span, start=span.start + first * width, stop=span.start + last * width)


def _scale(budget: Budget) -> list[float]:
    ratio = LARGEST / SMALLEST
    return [SMALLEST * ratio ** (n / (budget.strengths - 1)) for n in range(budget.strengths)]


def _places(plan: TrialPlan, bench: Bench, budget: Budget, span: Span) -> tuple[list[Place], list[dict[str, Any]]]:
    """The places that go on, most promising first, and the first-order effects of all that were looked at."""
    names = sorted(plan.candidates, key=lambda c: -_mean(plan.reading.get(c.name, {})))
    depth = bench.subject.facts.num_layers
    offered = sorted(set.intersection(*(set(c.vectors) for c in plan.candidates)))
    middle = [n for n in offered if SHALLOWEST * depth <= n <= DEEPEST * depth] or offered
    layers = _evenly(middle, budget.layers)
    grid = [Place(c.name, (layer,), 1, _size(plan, c.vectors, [layer])) for c in names[:1] for layer in layers]
    at_once = len(grid) + len(names) + 2
    base = bench.effect(Asked({}, 0.0, 0.0, ()), budget.pairs, SCORED_TOKENS, span.part(0, at_once))
    bench.expect(base)
    effects: dict[Place, float] = {}

    if not plan.continuations:
        # Nothing is known to continue: every place of a coarser grid is tried by writing.
        return [Place(c.name, (layer,), 1, _size(plan, c.vectors, [layer])) for c in names[:1]
                for layer in _evenly(middle, budget.places)], []

    def look(place: Place) -> float:
        asked = asked_at(place, plan, PROBE, ())
        part = span.part(min(len(effects) + 1, at_once - 1), at_once)
        effects[place] = bench.effect(asked, budget.pairs, SCORED_TOKENS, part) - base
        return effects[place]

    for place in grid:
        look(place)
    first = max(grid, key=lambda place: effects[place])
    # Other tokens of the pair at the best layer; the direction turned round, should the pairs' order mislead.
    for other in names[1:]:
        look(Place(other.name, first.layers, 1, _size(plan, other.vectors, first.layers)))
    look(replace(first, sign=-1))
    ranked = sorted(effects, key=lambda place: -effects[place])
    # Neighbours do much the same: the places that are tried lie apart.
    kept: list[Place] = []
    for place in ranked:
        if len(kept) < budget.places - 1 and not any(_near(place, other, layers) for other in kept):
            kept.append(place)
    wide = _band_of_layers(plan, kept[0], offered, depth)
    if wide is not None:
        look(wide)
        kept.append(wide)
    told = [{"candidate": place.candidate, "layers": list(place.layers), "sign": place.sign,
             "log_odds": rounded(effect) if math.isfinite(effect) else None} for place, effect in effects.items()]
    return kept, told


def _near(a: Place, b: Place, layers: Sequence[int]) -> bool:
    if a.candidate != b.candidate or a.sign != b.sign:
        return a.layers == b.layers and a.candidate == b.candidate
    return abs(layers.index(a.layers[0]) - layers.index(b.layers[0])) < 2 and len(layers) > 4


def _band_of_layers(plan: TrialPlan, place: Place, offered: Sequence[int], depth: int) -> Place | None:
    """The place with its neighbours on both sides; None where there are none."""
    half = max(1, round(WIDTH * depth / 2))
    at = place.layers[0]
    layers = tuple(n for n in offered if abs(n - at) <= half)
    if len(layers) < 2:
        return None
    vectors = next(c.vectors for c in plan.candidates if c.name == place.candidate)
    return replace(place, layers=layers, size=_size(plan, vectors, layers))


def _size(plan: TrialPlan, vectors: Mapping[int, torch.Tensor], layers: Sequence[int]) -> float:
    return 1 / sum(float(vectors[layer].norm()) / plan.scales[layer] for layer in layers)


def _refined(bench: Bench, plan: TrialPlan, place: Place, best: Arm, questions: Sequence[Any], span: Span) -> list[Arm]:
    """Strengths around the best one, by rising strength."""
    steps = [best.share * factor for factor in (0.5, 0.7, 1.0, 1.4, 2.0)[:REFINED]]
    return bench.arms([asked_at(place, plan, share, questions) for share in steps], span)


def _random(bench: Bench, plan: TrialPlan, place: Place, chosen: Arm, budget: Budget, questions: Sequence[Any],
            generator: torch.Generator, span: Callable[[float], None]) -> list[Arm]:
    like = asked_at(place, plan, chosen.share, questions)
    return bench.arms([replace(like, vectors={layer: random_like(vector, generator)
                                              for layer, vector in like.vectors.items()})
                       for _ in range(budget.draws)], span)


def _graded_by(plan: TrialPlan, bench: Bench) -> dict[str, Any]:
    if plan.grader is not None:
        return plan.grader.model_dump(mode="json")
    assert bench.classifier is not None
    return {"kind": "pairs", "accuracy": bench.classifier.accuracy, "layer": bench.classifier.layer,
            "threshold": rounded(bench.threshold)}


def _told(arm: Arm) -> dict[str, Any]:
    return {**arm.as_dict(), "sample": [{"prompt": prompt, "text": text, "outcome": outcome}
                                        for prompt, text, outcome in arm.texts]}


def _evenly(numbers: Sequence[int], count: int) -> list[int]:
    if len(numbers) <= count:
        return list(numbers)
    return sorted({numbers[round(n * (len(numbers) - 1) / (count - 1))] for n in range(count)})


def _mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0
