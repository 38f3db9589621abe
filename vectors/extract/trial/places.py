"""Where a candidate is tried: layers by their first-order effect, and what lies beside the best one.

The first-order effect is how much likelier one moderate step makes the pairs' own positive continuations. Their
log-odds against the negative ones would not do, because a step that breaks the model makes both unlikely.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from vectors.extract.standing import rounded
from vectors.extract.trial.bench import Asked, Bench, asked_at
from vectors.extract.trial.effort import SCORED_TOKENS, Budget
from vectors.extract.trial.plan import TrialPlan
from vectors.extract.trial.surface import Place

# Layers outside of these shares of the depth only spell or read out: on SmolLM2, layer 3 of 30 shows an effect only at
# strengths close to those that break the text.
SHALLOWEST, DEEPEST = 0.2, 0.9
# The step that is looked at, as a share of the activations' length.
MODERATE = 0.27
# A band takes this share of the model's layers. What a direction that was read at each of them does adds up over a wide
# band, while random directions of the same length mostly do not.
NARROW, WIDE = 0.12, 0.5


def promising(plan: TrialPlan, bench: Bench, budget: Budget, step: Callable[[float], None]
              ) -> tuple[list[Place], list[dict[str, Any]]]:
    """The places that are tried by writing, most promising first, and the first-order effects of all looked at."""
    # The first choice of tokens, unless another one reads better by more than luck.
    names = sorted(plan.candidates, key=lambda c: -round(_mean(plan.reading.get(c.name, {})), 1))
    middle = _middle(plan, bench)
    wide = [at(plan, names[0].name, layers) for layers in _wide(middle, bench)]
    if not plan.continuations:
        # Nothing is known to continue: every place of a coarser grid is tried by writing, and the band in its middle.
        singles = _evenly(middle, budget.places - len(wide))
        return wide + [at(plan, names[0].name, (layer,)) for layer in singles], []
    grid = [at(plan, names[0].name, (layer,)) for layer in _evenly(middle, budget.layers)]
    nothing = [Asked({}, 0.0, 0.0, ())]
    step(0.0)
    [base] = bench.continued(nothing, budget.pairs, SCORED_TOKENS)
    [other] = bench.continued(nothing, budget.pairs, SCORED_TOKENS, "negative")
    bench.expect(base - other)
    effects: dict[Place, float] = {}

    def look(places: Sequence[Place]) -> None:
        step(len(effects) / (len(grid) + len(wide) + len(names)))
        found = bench.continued([asked_at(place, plan, MODERATE, ()) for place in places], budget.pairs, SCORED_TOKENS)
        effects.update({place: value - base for place, value in zip(places, found, strict=True)})

    look(grid)
    first = max(grid, key=lambda place: effects[place])
    # Other tokens of the pair at the best layer; the direction turned round, should the pairs' order mislead.
    look([*(at(plan, candidate.name, first.layers) for candidate in names[1:]), replace(first, sign=-1)])
    kept = wide + _apart(sorted(effects, key=lambda place: -effects[place]), middle, budget.places - len(wide))
    look(wide)
    return kept, [{"candidate": place.candidate, "layers": list(place.layers), "sign": place.sign,
                   "effect": rounded(effect) if math.isfinite(effect) else None} for place, effect in effects.items()]


def beside(place: Place, plan: TrialPlan, bench: Bench, budget: Budget) -> list[Place]:
    """A few layers up and down, the layers around a single one together, and another choice of tokens."""
    offered = _offered(plan)
    middle = _middle(plan, bench)
    far = max(1, round(len(middle) / budget.layers / 2), len(place.layers) // 4)
    around = [tuple(n + step for n in place.layers) for step in (-far, far)]
    if len(place.layers) == 1:
        half = max(1, round(NARROW * bench.subject.facts.num_layers / 2))
        around.append(tuple(n for n in offered if abs(n - place.layers[0]) <= half))
    found = [replace(at(plan, place.candidate, layers), sign=place.sign) for layers in around
             if set(layers) <= set(offered) and layers != place.layers]
    found += [replace(at(plan, candidate.name, place.layers), sign=place.sign) for candidate in plan.candidates
              if candidate.name != place.candidate][:1]
    return found


def _wide(middle: Sequence[int], bench: Bench) -> list[tuple[int, ...]]:
    """The wide band in the midst of the layers that are looked at, if they are more than one."""
    width = min(len(middle), round(WIDE * bench.subject.facts.num_layers))
    start = (len(middle) - width + 1) // 2
    return [tuple(middle[start:start + width])] if width > 1 else []


def at(plan: TrialPlan, candidate: str, layers: tuple[int, ...]) -> Place:
    vectors = next(c.vectors for c in plan.candidates if c.name == candidate)
    return Place(candidate, layers, 1, 1 / sum(float(vectors[layer].norm()) / plan.scales[layer] for layer in layers))


def _offered(plan: TrialPlan) -> list[int]:
    vectors: list[Mapping[int, torch.Tensor]] = [c.vectors for c in plan.candidates]
    return sorted(set.intersection(*map(set, vectors)))


def _middle(plan: TrialPlan, bench: Bench) -> list[int]:
    depth, offered = bench.subject.facts.num_layers, _offered(plan)
    return [n for n in offered if SHALLOWEST * depth <= n <= DEEPEST * depth] or offered


def _apart(ranked: Sequence[Place], layers: Sequence[int], count: int) -> list[Place]:
    """The best of each third of the depth, then the best of the rest: neighbours do much the same, and what one step
    does to the pairs' own texts tells layers of one depth apart better than depths."""
    def third(place: Place) -> int:
        return 3 * layers.index(place.layers[0]) // len(layers)

    first = {third(place): place for place in reversed(ranked)}
    kept = [place for place in ranked if first[third(place)] is place]
    return (kept + [place for place in ranked if place not in kept])[:count]


def _evenly(numbers: Sequence[int], count: int) -> list[int]:
    if len(numbers) <= count:
        return list(numbers)
    return sorted({numbers[round(n * (len(numbers) - 1) / (count - 1))] for n in range(count)})


def _mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values) if values else 0.0
