"""How often the test of roll-outs is wrong, and how soon it is right, by simulation.

    python -m scripts.rollout_simulation

The rounds are those that the server's own test sees (`server.rollouts.evidence`), looked at after each of them. A run
is a false alarm if the test ends the roll-out at any look of the whole horizon. It prints the tables of
docs/rollouts.md; the same seed gives the same figures.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from server.rollouts.evidence import STAKES, enough

SEED, RUNS, HORIZON = 17, 10_000, 5000
ALPHA = 0.05
# Rounds at a time, because all runs go on together.
CHUNK = 50


@dataclass(frozen=True)
class Samples:
    """How samples of one arm fall: 1 with the probability p, else 0; or, where they are spread, between 0 and 1 with
    the mean p (a beta distribution, as doses may have that are taken as a share of their scale)."""

    p: float
    spread: bool = False

    def draw(self, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        if self.spread:
            return random.beta(4 * self.p, 4 * (1 - self.p), shape)
        return (random.random(shape) < self.p).astype(float)


@dataclass(frozen=True)
class Case:
    """share: of the candidate. margin: as the rail states it. drift: both arms rise and fall together."""

    name: str
    stable: Samples
    candidate: Samples
    margin: float
    share: float = 0.5
    drift: bool = False


def proportion(p: float) -> Samples:
    return Samples(p)


def spread(mean: float) -> Samples:
    return Samples(mean, spread=True)


NULLS = [
    Case("refusals, both 5 %, margin 0", proportion(0.05), proportion(0.05), 0.0),
    Case("refusals, both 50 %, margin 0", proportion(0.5), proportion(0.5), 0.0),
    Case("refusals, 5 % and 10 %, margin 5 points", proportion(0.05), proportion(0.10), 0.05),
    Case("refusals, both 20 %, candidate's share 5 %", proportion(0.2), proportion(0.2), 0.0, 0.05),
    Case("dose, both of mean 0.30 of the scale, margin 0", spread(0.3), spread(0.3), 0.0),
    Case("dose, 0.30 and 0.35, margin 0.05", spread(0.3), spread(0.35), 0.05),
    Case("refusals that drift together between 5 and 45 % over a day, margin 0", proportion(1.0), proportion(1.0), 0.0,
         drift=True),
]
DIFFERENT = [
    Case("refusals 5 -> 10 %, margin 0", proportion(0.05), proportion(0.10), 0.0),
    Case("refusals 5 -> 15 %, margin 2 points", proportion(0.05), proportion(0.15), 0.02),
    Case("refusals 5 -> 30 %, margin 2 points", proportion(0.05), proportion(0.30), 0.02),
    Case("refusals 5 -> 30 %, margin 2 points, candidate's share 5 %", proportion(0.05), proportion(0.30), 0.02, 0.05),
    Case("every request fails, none before, margin 0", proportion(0.0), proportion(1.0), 0.0),
    Case("dose 0.30 -> 0.40 of the scale, margin 0.02", spread(0.3), spread(0.4), 0.02),
    Case("dose 0.30 -> 0.45 of the scale, margin 0.02", spread(0.3), spread(0.45), 0.02),
]


def alarms(case: Case, alpha: float, runs: int, horizon: int, seed: int = SEED) -> np.ndarray:
    """For each run the round at which the test ended it; 0 where it never did. [runs]"""
    random = np.random.default_rng(seed)
    wealth = np.zeros((runs, len(STAKES)))
    ended = np.zeros(runs, dtype=int)
    for start in range(0, horizon, CHUNK):
        differences = _rounds(case, random, (min(CHUNK, horizon - start), runs), start)
        going = np.flatnonzero(ended == 0)
        if not len(going):
            break
        for n, difference in enumerate(differences[:, going]):
            wealth[going] += np.log1p(STAKES * ((difference - case.margin) / (1 + case.margin))[:, None])
            now = wealth[going]
            top = now.max(axis=1)
            over = top + np.log(np.exp(now - top[:, None]).mean(axis=1)) >= enough(alpha)
            fresh = going[over]
            ended[fresh] = np.where(ended[fresh] == 0, start + n + 1, ended[fresh])
    return ended


def _rounds(case: Case, random: np.random.Generator, shape: tuple[int, int], start: int) -> np.ndarray:
    """Differences of candidate and stable, [rounds, runs]. Of unequal shares the arm with more has several samples a
    round, a geometric number, as they come."""
    if case.drift:
        level = 0.25 + 0.2 * np.sin((start + np.arange(shape[0])) / 1440 * 2 * np.pi)[:, None]
        return (random.random(shape) < level).astype(float) - (random.random(shape) < level)
    candidate = case.candidate.draw(random, shape)
    if case.share == 0.5:
        return candidate - case.stable.draw(random, shape)
    counts = random.geometric(case.share / (1 - case.share), shape)
    return candidate - random.binomial(counts, case.stable.p) / counts


def naive(case: Case, runs: int, horizon: int, seed: int = SEED) -> float:
    """How often a test of fixed size (two means, normal, one-sided at ALPHA) that is looked at after each round, from
    the 50th on, calls a difference. This is what the test of roll-outs is there to avoid."""
    random = np.random.default_rng(seed)
    count, total, squares = 0, np.zeros(runs), np.zeros(runs)
    called = np.zeros(runs, dtype=bool)
    for start in range(0, horizon, CHUNK):
        for difference in _rounds(case, random, (CHUNK, runs), start):
            count, total, squares = count + 1, total + difference, squares + difference**2
            deviation = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 1e-12) / count)
            called |= (count >= 50) & ((total / count - case.margin) / deviation > 1.645)
    return float(called.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--horizon", type=int, default=HORIZON, help="Rounds, which are looks, of each run.")
    given = parser.parse_args()
    print(f"{given.runs} runs, {given.horizon} looks each, alpha {ALPHA}, seed {SEED}\n")
    print("| no difference beyond the margin | ended by false alarm | a fixed-size test, looked at as often |")
    print("|---|---|---|")
    for case in NULLS:
        found = alarms(case, ALPHA, given.runs, given.horizon)
        print(f"| {case.name} | {(found > 0).mean():.2%} | {naive(case, given.runs, given.horizon):.0%} |", flush=True)
    print("\n| a difference | ended within the horizon | rounds, median | rounds, 90 % of runs |")
    print("|---|---|---|---|")
    for case in DIFFERENT:
        found = alarms(case, ALPHA, given.runs, given.horizon)
        rounds = np.where(found == 0, np.inf, found)
        middle, most = np.quantile(rounds, [0.5, 0.9], method="higher")
        print(f"| {case.name} | {(found > 0).mean():.1%} | {_count(middle)} | {_count(most)} |", flush=True)


def _count(rounds: float) -> str:
    return "more" if np.isinf(rounds) else f"{rounds:.0f}"


if __name__ == "__main__":
    main()
