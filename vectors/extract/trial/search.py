"""The trial itself: from many candidates to one default, or to the verdict that nothing works.

1. Untouched: all questions are answered as ever, and where there is an instruction, as it asks.
2. First order: `places` looks at many layers and keeps the most promising.
3. Scouting: each place answers some questions at a moderate strength, then at another one that depends on what the
   first did: a smaller one where texts broke, a larger one where they did not. What lies beside the best place is tried
   at its best strength.
4. Refining: the best band of layers and the best single layer answer all questions. The band does so at strengths
   around its best one, unless the single layer is clearly better. From these follow the band of strengths and the
   default in its middle.
5. Random vectors of equal length answer at the default.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vectors.extract.standing import random_like, rounded
from vectors.extract.subject import Subject
from vectors.extract.trial import classifier
from vectors.extract.trial.bench import Asked, Bench, asked_at
from vectors.extract.trial.effort import BUDGETS, Budget
from vectors.extract.trial.places import MODERATE, beside, promising
from vectors.extract.trial.plan import Question, TrialPlan
from vectors.extract.trial.surface import Arm, Place, band_of, verdict
from vectors.extract.work import Span

# A classifier that knows the sides worse than this is no grader.
LEAST_ACCURACY = 0.75
# What a strength is multiplied with from one round to the next; less where most texts already succeed.
STRIDE, SMALL_STRIDE, MOST = 1.6, 1.25, 0.75
# Strengths around the best one, beside itself; on SmolLM2 twice the strength that shows breaks texts. Where the
# strongest is whole, so many stronger ones are tried, because otherwise nobody knows where the band ends.
AROUND, BEYOND = (0.65, 0.8, 1.25), 2
# By how much a single layer must be worth more than a band: a dozen texts tell no smaller difference from luck, and on
# many texts bands are better, and random vectors of the same length do less there.
CLEARLY = 0.3


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
    places, effects = promising(plan, bench, budget, _parts(span, 2, 4))
    instructed = None if plan.options.instruction is None else bench.instructed(questions, span.part(4, 12))
    # Steered texts need be no better than those that the model writes when it is asked, and no likelier than the kind
    # of text that is wanted.
    usual = replace(base, broken=max(base.broken, 0.0 if instructed is None else instructed.broken),
                    surprise=max(base.surprise, bench.usual))
    # Scouting sees some of the questions only, and is compared with the untouched answers to all of them.
    scouted = _scouted(plan, bench, budget, places, some, usual, _parts(span, 5, 8))
    place, refined = _refined(plan, bench, scouted, questions, usual, _parts(span, 8, 10))
    band = band_of(refined, usual)
    top = max(refined, key=lambda arm: arm.worth(usual))
    # Of two that are as near to the middle, the weaker one.
    chosen = top if band is None else min(refined, key=lambda arm: (
        round(abs(math.log(arm.strength / band.default)), 2), arm.share))
    random = bench.arms(_like(asked_at(place, plan, chosen.share, some), budget.draws, generator), _parts(span, 10, 12))
    return Tried(place, chosen.strength, verdict(chosen, usual, random), {
        "effort": plan.options.effort, "completions": bench.written, "questions": len(questions),
        "grader": _graded_by(plan, bench), "place": place.name, "layers": list(place.layers),
        "untouched": _told(base), "default": _told(chosen),
        **({} if instructed is None else {"instructed": {"instruction": plan.options.instruction,
                                                         **_told(instructed)}}),
        "band": None if band is None else {"low": rounded(band.low), "high": rounded(band.high)},
        "effects": effects, "scouted": [{"place": one.name, "layers": list(one.layers), "sign": one.sign,
                                         "arms": [arm.as_dict() for arm in sorted(arms, key=lambda arm: arm.share)]}
                                        for one, arms in scouted.items()],
        "surface": [arm.as_dict() for arm in refined],
        "random": {"draws": len(random), "success": [round(arm.success, 4) for arm in random],
                   "broken": [round(arm.broken, 4) for arm in random],
                   **({"sample": _told(random[0])["sample"]} if random else {})}})


def _parts(span: Span, first: int, last: int) -> Span:
    width = (span.stop - span.start) / 12
    return replace(span, start=span.start + first * width, stop=span.start + last * width)


def _scouted(plan: TrialPlan, bench: Bench, budget: Budget, places: Sequence[Place], questions: Sequence[Question],
             usual: Arm, span: Span) -> dict[Place, list[Arm]]:
    """By place, what was written at each strength that was tried. All places of a round are written in one batch."""
    found: dict[Place, list[Arm]] = {place: [] for place in places}
    shares = dict.fromkeys(places, MODERATE)
    for number in range(budget.rounds):
        arms = bench.arms([asked_at(place, plan, shares[place], questions) for place in places],
                          span.part(number, budget.rounds + 1))
        for place, arm in zip(places, arms, strict=True):
            found[place].append(arm)
            shares[place] = next_share(found[place], usual)
    place = max(places, key=lambda one: _best(found[one], usual).worth(usual))
    best = _best(found[place], usual)
    others = [other for other in beside(place, plan, bench, budget) if other not in found]
    arms = bench.arms([asked_at(other, plan, best.share, questions) for other in others],
                      span.part(budget.rounds, budget.rounds + 1))
    return found | {other: [arm] for other, arm in zip(others, arms, strict=True)}


def _refined(plan: TrialPlan, bench: Bench, scouted: Mapping[Place, Sequence[Arm]], questions: Sequence[Question],
             usual: Arm, span: Span) -> tuple[Place, list[Arm]]:
    """The better of two places when both answer all questions, and its arms by rising strength."""
    best = {place: _best(arms, usual) for place, arms in scouted.items()}
    ranked = sorted(best, key=lambda place: -best[place].worth(usual))
    first = {len(place.layers) > 1: place for place in reversed(ranked)}
    finalists = list(first.values()) if len(first) > 1 else ranked[:2]
    arms = bench.arms([asked_at(place, plan, best[place].share, questions) for place in finalists], span.part(0, 3))
    place, own = max(zip(finalists, arms, strict=True), key=lambda found: (
        found[1].worth(usual) + (CLEARLY if len(found[0].layers) > 1 else 0.0)))
    others = bench.arms([asked_at(place, plan, own.share * factor, questions) for factor in AROUND], span.part(1, 3))
    arms = sorted([own, *others], key=lambda arm: arm.share)
    for number in range(BEYOND):
        if arms[-1].whole(usual):
            beyond = asked_at(place, plan, arms[-1].share * STRIDE, questions)
            arms += bench.arms([beyond], span.part(2 * BEYOND + number, 3 * BEYOND))
    return place, arms


def _best(arms: Sequence[Arm], usual: Arm) -> Arm:
    """Of those that are whole, if any are."""
    return max([arm for arm in arms if arm.whole(usual)] or arms, key=lambda arm: arm.worth(usual))


def next_share(arms: Sequence[Arm], usual: Arm) -> float:
    """The share to try after these: between what was whole and what broke, or beyond the ends of what was tried."""
    broken = [arm.share for arm in arms if not arm.whole(usual)]
    whole = [arm for arm in arms if arm.whole(usual)]
    if not whole:
        return min(broken) / STRIDE
    largest = max(whole, key=lambda arm: arm.share)
    above = [share for share in broken if share > largest.share]
    if above:
        return math.sqrt(largest.share * min(above))
    return largest.share * (SMALL_STRIDE if largest.success >= MOST else STRIDE)


def _like(asked: Asked, count: int, generator: torch.Generator) -> list[Asked]:
    """Random vectors of equal length, of its own at each layer, at the same strength."""
    return [replace(asked, vectors={layer: random_like(vector, generator) for layer, vector in asked.vectors.items()})
            for _ in range(count)]


def _graded_by(plan: TrialPlan, bench: Bench) -> dict[str, Any]:
    if plan.grader is not None:
        return plan.grader.model_dump(mode="json")
    assert bench.classifier is not None
    return {"kind": "pairs", "accuracy": bench.classifier.accuracy, "layer": bench.classifier.layer,
            "threshold": rounded(bench.threshold)}


def _told(arm: Arm) -> dict[str, Any]:
    return {**arm.as_dict(), "sample": [{"prompt": prompt, "text": text, "outcome": outcome}
                                        for prompt, text, outcome in arm.texts]}
