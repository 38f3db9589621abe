"""How strongly samples speak against "the candidate is no worse than the stable version", at every moment.

The test is a bet. In each round one candidate sample, or the mean of a few, is set against the mean of the stable
samples of about the same time. The difference D lies in [-1, 1]. Somebody stakes a share s of what they have on D being
over the margin m, and after each round has 1 + s (D - m) / (1 + m) times as much. If the candidate is no worse, so that
E[D | past] <= m, nobody can expect to gain by that. The wealth is then a nonnegative supermartingale that begins at 1,
and it ever reaches 1/alpha with a probability of at most alpha (Ville's inequality), however often it is looked at and
whenever one stops. As nobody knows the best stake, equal parts are put on each of a fixed set of them, and their sum is
such a wealth too.

Nothing is assumed of how samples are distributed but that they are bounded. What is assumed: whether a sample falls to
one arm or the other says nothing of what it is, and samples of one arm do not hang together, as many of one user would.

Sources: Shekhar and Ramdas, "Nonparametric Two-Sample Testing by Betting", IEEE Transactions on Information Theory 70
(2024), for tests of two samples as bets; Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", Journal of the Royal Statistical Society B 86 (2024), for bounded means; Robbins, "Statistical methods related
to the law of the iterated logarithm", Annals of Mathematical Statistics 41 (1970), for mixtures; Ville, "Etude critique
de la notion de collectif" (1939).
"""

import math
from collections.abc import Sequence

import numpy as np

# Small stakes find small differences late, large ones large differences soon.
STAKES = np.geomspace(0.004, 0.98, 16)


def growth(difference: float, margin: float) -> np.ndarray:
    """What one round adds to the logarithm of the wealth of each stake, [16].

    Args:
        difference: of the two arms, in [-1, 1]; larger is worse.
        margin: how much worse the candidate may be, in [0, 1).
    """
    return np.log1p(STAKES * ((difference - margin) / (1 + margin)))


def log_wealth(wealth: Sequence[float]) -> float:
    """The logarithm of the mean wealth over the stakes; 0 before the first round."""
    if not len(wealth):
        return 0.0
    logs = np.asarray(wealth)
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).mean()))


def enough(alpha: float) -> float:
    """The logarithm that the wealth has to reach."""
    return math.log(1 / alpha)
