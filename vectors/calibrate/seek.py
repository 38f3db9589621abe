"""The strengths at which a dose begins and ends: roots of a rising curve, found with few measurements."""

import math
from collections.abc import Callable, Mapping

# What a small step does: KL grows with the square of the strength.
SLOPE, LEAST_SLOPE, MOST_SLOPE = 2.0, 0.5, 4.0
# How far one try goes, and all of them together, as factors of the strength.
LEAP, FAR = 16.0, 2.0**20
TRIES = 8
# A curve that rises so little has come to its end.
FLAT = 0.05
# A root of the lower dose lies below it and not by more than this factor, that of the upper one above it likewise.
LOOSE = 3.0
LEAST_KL = 1e-9


class Seeker:
    """Looks for strengths by the KL they give.

    measure: KL at a strength; infinite where the model does not bear it. start: the strength to begin at. seen: KL that
    was measured before.
    """

    def __init__(self, measure: Callable[[float], float], start: float, seen: Mapping[float, float] | None = None
                 ) -> None:
        self._measure, self._start = measure, start
        self._seen = dict(seen or {})

    @property
    def borne(self) -> list[float]:
        """Strengths that were measured and have a finite KL, rising."""
        return sorted(strength for strength, kl in self._seen.items() if math.isfinite(kl))

    def below(self, dose: float) -> float | None:
        """A strength that gives `dose` or a little less; the nearest that was found, None where the model bears none.
        """
        self._look(dose / math.sqrt(LOOSE), lambda kl: dose / LOOSE <= kl <= dose)
        fitting = [strength for strength in self.borne if self._seen[strength] <= dose]
        return max(fitting) if fitting else min(self.borne, default=None)

    def above(self, dose: float) -> float | None:
        """A strength that gives `dose` or a little more; likewise."""
        self._look(dose * math.sqrt(LOOSE), lambda kl: dose <= kl <= dose * LOOSE)
        fitting = [strength for strength in self.borne if self._seen[strength] >= dose]
        return min(fitting) if fitting else max(self.borne, default=None)

    def _look(self, aim: float, good: Callable[[float], bool]) -> None:
        if not self._seen:
            self._try(self._start)
        for _ in range(TRIES):
            if any(good(kl) for kl in self._seen.values()):
                return
            strength = self._next(aim)
            if strength is None or not self._try(strength):
                return

    def _try(self, strength: float) -> bool:
        """False for one that was tried, or that lies too far off."""
        rounded = float(f"{strength:.6g}")
        if rounded in self._seen or not self._start / FAR <= rounded <= self._start * FAR:
            return False
        self._seen[rounded] = self._measure(rounded)
        return True

    def _next(self, aim: float) -> float | None:
        """Where the curve should give `aim`, going by its nearest points."""
        known = [(strength, max(self._seen[strength], LEAST_KL)) for strength in self.borne]
        burst = min((strength for strength, kl in self._seen.items() if not math.isfinite(kl)), default=math.inf)
        if not known:
            return burst / LEAP
        under = [point for point in known if point[1] <= aim]
        over = [point for point in known if point[1] > aim]
        if under and over:
            a, b = under[-1], over[0]
            return math.sqrt(a[0] * b[0]) if a[0] >= b[0] or a[1] == b[1] else a[0] * (b[0] / a[0]) ** (
                math.log(aim / a[1]) / math.log(b[1] / a[1]))
        near, other = (known[-1], known[-2:-1]) if under else (known[0], known[1:2])
        slope = SLOPE
        if other and other[0][1] != near[1]:
            slope = math.log(near[1] / other[0][1]) / math.log(near[0] / other[0][0])
            if under and slope < FLAT and near[1] > LEAST_KL:
                return None
        factor = (aim / near[1]) ** (1 / min(max(slope, LEAST_SLOPE), MOST_SLOPE))
        found = near[0] * min(max(factor, 1 / LEAP), LEAP)
        return found if found < burst else math.sqrt(near[0] * burst)
