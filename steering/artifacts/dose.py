"""From a dose to a strength: curves of KL per token against strength that were measured, and their inverse.

A dose is KL(steered || untouched) in nats per generated token, the mean that effects report as `total.kl.mean`. Small
strengths move it with their square and large ones saturate, so both axes are logarithms.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from steering.language.errors import InvalidSpec
from steering.language.scope import Scope
from steering.language.vocabulary import Op, Site

# Below this a measured KL is rounding noise. It is taken for this number, because its logarithm must exist.
LEAST_KL = 1e-9


@dataclass(frozen=True)
class Curve:
    """kl[i] nats were measured at the raw strength strengths[i] > 0 (its sign left out), strengths rising."""

    strengths: tuple[float, ...]
    kl: tuple[float, ...]

    @property
    def reach(self) -> tuple[float, float]:
        """The smallest and the largest dose for which `strength` knows a strength."""
        rising = self.rising()
        return rising[0], rising[-1]

    def rising(self) -> tuple[float, ...]:
        """KL made monotone: the least-squares fit of its logarithm among sequences that never fall."""
        return tuple(np.exp(isotonic_regression(np.log(np.maximum(self.kl, LEAST_KL))).x).tolist())

    def strength(self, dose: float) -> float:
        """The smallest raw strength that gives `dose` nats, linear in log-log between measured points.

        Raises:
            InvalidSpec: the curve does not reach it, or begins above it.
        """
        rising = self.rising()
        low, high = rising[0], rising[-1]
        # The ends themselves count as reached whatever their logarithms were rounded to.
        if not low * (1 - 1e-9) <= dose <= high * (1 + 1e-9):
            raise InvalidSpec(f"a dose of {dose:g} nats lies outside of what was measured, {low:.3g} to {high:.3g}",
                              param="strength", fix="Ask for a dose in between, give the strength in raw, or extend "
                              "the curve: trimtab calibrate NAME --extend --reach LOW,HIGH --prompts FILE.")
        after = next((i for i, kl in enumerate(rising) if kl >= dose), len(rising) - 1)
        if after == 0:
            return self.strengths[0]
        before = after - 1
        return _between(dose, (rising[before], rising[after]), (self.strengths[before], self.strengths[after]))

    def kl_at(self, strength: float) -> float | None:
        """KL at a raw strength; None outside of the measured strengths."""
        first, last = self.strengths[0], self.strengths[-1]
        if not first * (1 - 1e-9) <= strength <= last * (1 + 1e-9):
            return None
        rising = self.rising()
        after = next((i for i, s in enumerate(self.strengths) if s >= strength), len(rising) - 1)
        if after == 0:
            return rising[0]
        before = after - 1
        return _between(strength, (self.strengths[before], self.strengths[after]), (rising[before], rising[after]))


def _between(x: float, xs: tuple[float, float], ys: tuple[float, float]) -> float:
    """y at x on the straight line through two points in log-log."""
    share = math.log(x / xs[0]) / math.log(xs[1] / xs[0])
    return ys[0] * math.exp(math.log(ys[1] / ys[0]) * min(max(share, 0.0), 1.0))


@dataclass(frozen=True)
class Calibrated:
    """Curves of one artifact version in one setting. A dose is valid only for the places and tokens it was measured
    with.

    options, scope: as canonical JSON. down: for negative strengths, None where they have no meaning.
    """

    fingerprint: str
    op: Op
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    options: str
    scope: str
    up: Curve
    down: Curve | None

    def fits(self, op: Op, sites: Sequence[Site], layers: Sequence[int], options: Mapping[str, Any], scope: Scope
             ) -> bool:
        return ((self.op, self.sites, self.layers, self.options, self.scope)
                == (op, tuple(sites), tuple(sorted(layers)), canonical(options), canonical_scope(scope)))

    def strength(self, dose: float) -> float:
        """Raw strength for a dose; a negative dose is that size with the other sign. A dose of 0 is the strength 0.

        Raises:
            InvalidSpec: beyond the curve, or negative where that has no meaning.
        """
        if dose == 0:
            return 0.0
        if dose > 0:
            return self.up.strength(dose)
        if self.down is None:
            raise InvalidSpec(f"a negative dose has no meaning for the op {self.op}", param="strength",
                              fix="Leave the sign out.")
        return -self.down.strength(-dose)

    def kl_at(self, strength: float) -> float | None:
        """KL that was measured at a raw strength; None where nothing was."""
        curve = self.up if strength > 0 else self.down
        return None if curve is None or strength == 0 else curve.kl_at(abs(strength))


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def canonical_scope(scope: Scope) -> str:
    return canonical(scope.model_dump(mode="json", exclude_defaults=True))
