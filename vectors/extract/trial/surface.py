"""What a trial measured, and what follows from it: the band, the default in its middle, and the verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vectors.extract.standing import rounded

# A success more often than untouched by this much is visible; broken by more than this is no longer whole.
VISIBLE, WHOLE = 0.2, 0.1
# Nats a token by which the texts of an arm may be less likely, on average, than is usual: less than a third of what
# makes a single text broken. The questions of a trial are everyday ones. On SmolLM2, where what is asked is at odds
# with what is wanted, texts grow unlikely twice as fast: at 0.2 in the trial by 0.5, and then one in eight is broken.
UNUSUAL = 0.3
# What a broken text costs beside not being a success.
DAMAGE = 0.5
# Of the most that was gained: where half of it is reached, the effect is there.
ENOUGH = 0.5


@dataclass(frozen=True)
class Place:
    """One candidate at some layers. size: mean length of the activations there over that of the vector: a strength of
    `size` moves a token by its own length, in all layers together."""

    candidate: str
    layers: tuple[int, ...]
    sign: int
    size: float

    @property
    def name(self) -> str:
        where = str(self.layers[0]) if len(self.layers) == 1 else f"{self.layers[0]} to {self.layers[-1]}"
        return f"{'' if self.sign > 0 else 'minus '}{self.candidate}, layer {where}"


@dataclass(frozen=True)
class Arm:
    """What was written under one program. share: step as a share of the activations' length; strength: raw, with its
    sign. success, broken: shares of the texts. score: mean of the grader's own measure, where it has one. surprise:
    nats a token under the untouched model. texts: (question, text, outcome)."""

    share: float
    strength: float
    success: float
    broken: float
    score: float
    surprise: float
    repetition: float
    count: int
    texts: tuple[tuple[str, str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"share": rounded(self.share), "strength": rounded(self.strength), "success": round(self.success, 4),
                "broken": round(self.broken, 4), "score": rounded(self.score), "surprise": rounded(self.surprise),
                "repetition": round(self.repetition, 4), "texts": self.count}

    def worth(self, base: "Arm") -> float:
        """For comparing arms. Texts that succeed are whole; what is broken beyond what is usual counts against an arm
        once more. The mean score breaks ties, and of equals the smaller step is the better one."""
        return (self.success - base.success - DAMAGE * max(0.0, self.broken - base.broken)
                + 0.2 * math.tanh(self.score - base.score) * (1 - self.broken) - 0.02 * self.share)

    def whole(self, base: "Arm") -> bool:
        """Whether no more than WHOLE, or than one text, is broken beyond what is usual, and the texts are not so
        unlikely that on other questions more of them would be."""
        return (self.broken <= base.broken + max(WHOLE, 1 / self.count) + 1e-9
                and self.surprise <= base.surprise + UNUSUAL)


@dataclass(frozen=True)
class Band:
    """Raw strengths, the smaller first, between which the effect is visible and the text whole."""

    low: float
    high: float
    default: float


def band_of(arms: Sequence[Arm], base: Arm) -> Band | None:
    """arms: of one place and sign, by rising strength. The run of visible and whole strengths around the best arm; its
    default lies in the middle, on the scale of logarithms. None where no strength is both."""
    best = max((arm.success for arm in arms), default=0.0)
    least = base.success + max(VISIBLE, ENOUGH * (best - base.success))
    good = [arm.success >= least - 1e-9 and arm.whole(base) for arm in arms]
    if not any(good):
        return None
    top = max((n for n in range(len(arms)) if good[n]), key=lambda n: (arms[n].worth(base), -n))
    first = last = top
    while first > 0 and good[first - 1]:
        first -= 1
    while last + 1 < len(arms) and good[last + 1]:
        last += 1
    low, high = arms[first].strength, arms[last].strength
    return Band(low, high, math.copysign(math.sqrt(low * high), high))


def verdict(found: Arm, base: Arm, random: Sequence[Arm]) -> str | None:
    """None where the default does what was wanted; otherwise why it is a draft, in a sentence."""
    gained = found.success - base.success
    best = max((arm.success for arm in random), default=0.0)
    if random and found.success <= best:
        return (f"nothing that was tried beat random vectors of equal length: {found.success:.0%} of the texts "
                f"succeed, of the best of {len(random)} random ones {best:.0%}")
    if gained < VISIBLE:
        return (f"no strength is both visible and whole: at the best one {found.success:.0%} of the texts succeed, "
                f"untouched {base.success:.0%}")
    if not found.whole(base):
        return (f"the text breaks before the effect shows: {found.broken:.0%} of the texts, untouched "
                f"{base.broken:.0%}; {found.surprise:.1f} nats a token, {base.surprise:.1f} are usual")
    return None
