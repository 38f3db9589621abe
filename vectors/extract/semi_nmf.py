"""Semi-nonnegative factorisation: A ~ G F^T, with usage G of zero and more and few neurons of any sign in each group.

The update rules are those of Ding, Li and Jordan 2010 (convex and semi-nonnegative matrix factorizations), with the
columns of F cut to their largest entries as in Shafran et al. 2025 (arXiv 2506.10920). The cut breaks the monotone
descent, so the best pair that was met is kept. The problem is not convex, so several beginnings are tried.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

# Added to what is inverted and divided by.
RIDGE = 1e-6
# Tokens of A in memory at a time.
BLOCK = 4096
# A smaller fall of the squared error, as a share of the squared length of A, is no improvement.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Factors:
    """groups: F `[f, K]`. usage: G `[n, K]`, zero or more; kept of the best beginning alone. error: squared length of
    A - G F^T as a share of that of A. iterations: that were run."""

    groups: torch.Tensor
    usage: torch.Tensor
    error: float
    iterations: int

    def unit(self) -> torch.Tensor:
        """`[f, K]`: columns of F at unit length; a group that is empty stays so."""
        found: torch.Tensor = self.groups / self.groups.norm(dim=0).clamp_min(1e-12)
        return found


def factorise(data: npt.NDArray[np.float32], count: int, *, kept: int, iterations: int, patience: int,
              restarts: int, generator: torch.Generator, step: Callable[[float], None]) -> list[Factors]:
    """One pair for each beginning, the best first.

    Args:
        data: A `[n, f]`, one row a token; may be a file, of which BLOCK rows are in memory at a time.
        count: K, of groups. kept: neurons that each of them may hold.
        iterations: most of each beginning. patience: of them without an improvement end it.
        step: called with the share done; it raises when the work is cancelled.
    """
    total = sum(float(block.double().square().sum()) for block in _blocks(data))
    found: list[Factors] = []
    for n in range(restarts):
        def told(share: float, n: int = n) -> None:
            step((n + share) / restarts)

        found.append(_one(data, total, count, kept, iterations, patience, generator, told))
        found.sort(key=lambda pair: pair.error)
        found[1:] = [replace(pair, usage=pair.usage[:0].clone()) for pair in found[1:]]
    return found


def _one(data: npt.NDArray[np.float32], total: float, count: int, kept: int, iterations: int, patience: int,
         generator: torch.Generator, step: Callable[[float], None]) -> Factors:
    usage = torch.rand(len(data), count, generator=generator) + RIDGE
    best: Factors | None = None
    since = done = 0
    groups: torch.Tensor | None = None
    for done in range(iterations + 1):
        step(done / (iterations + 1))
        products = across(data, usage)
        if groups is not None:
            error = squared_error(total, products, groups, usage) / max(total, 1e-30)
            since += 1
            if best is None or error < best.error:
                since = 0 if best is None or error < best.error - TOLERANCE else since
                best = Factors(groups.clone(), usage.clone(), error, done)
            if since >= patience or done == iterations:
                break
        groups, usage = updated(data, products, usage, kept)
    assert best is not None
    return Factors(best.groups, best.usage, best.error, done)


def updated(data: npt.NDArray[np.float32], products: torch.Tensor, usage: torch.Tensor, kept: int
            ) -> tuple[torch.Tensor, torch.Tensor]:
    """One iteration: groups that fit `usage` best, cut, and then usage by the multiplicative rule. products: A^T G."""
    ridge = RIDGE * torch.eye(usage.shape[1], dtype=torch.float64)
    groups = cut(torch.linalg.solve(gram(usage) + ridge, products.T).T.float(), kept)
    length = usage.norm(dim=0).clamp_min(1e-12)
    usage, groups = usage / length, groups * length
    inner = groups.T @ groups
    below, above = (-inner).relu(), inner.relu()
    parts = []
    for block, own in zip(_blocks(data), torch.split(usage, BLOCK), strict=True):
        met = block @ groups
        parts.append(own * ((met.relu() + own @ below) / ((-met).relu() + own @ above + RIDGE)).sqrt())
    return groups, torch.cat(parts)


def cut(groups: torch.Tensor, kept: int) -> torch.Tensor:
    """`[f, K]` with only the `kept` largest entries, by size, of each column."""
    where = groups.abs().topk(min(kept, len(groups)), dim=0).indices
    return torch.zeros_like(groups).scatter(0, where, groups.gather(0, where))


def across(data: npt.NDArray[np.float32], usage: torch.Tensor) -> torch.Tensor:
    """A^T G, `[f, K]` float64."""
    found = torch.zeros(data.shape[1], usage.shape[1], dtype=torch.float64)
    for block, own in zip(_blocks(data), torch.split(usage, BLOCK), strict=True):
        found += (block.T @ own).double()
    return found


def gram(usage: torch.Tensor) -> torch.Tensor:
    """G^T G, `[K, K]` float64."""
    found = torch.zeros(usage.shape[1], usage.shape[1], dtype=torch.float64)
    for block in torch.split(usage, BLOCK):
        found += block.double().T @ block.double()
    return found


def squared_error(total: float, products: torch.Tensor, groups: torch.Tensor, usage: torch.Tensor) -> float:
    """Squared length of A - G F^T, from that of A (`total`) and A^T G."""
    groups = groups.double()
    both = (groups.T @ groups) * gram(usage)
    return max(total - 2 * float((products * groups).sum()) + float(both.sum()), 0.0)


def shuffled_columns(data: npt.NDArray[np.float32], into: npt.NDArray[np.float32], generator: torch.Generator,
                     at_once: int = 64) -> None:
    """The control: every neuron's values dealt to other tokens, so that what is active together is chance, and how
    active a neuron is stays. Written to `into`, of the same shape."""
    for start in range(0, data.shape[1], at_once):
        part = data[:, start:start + at_once].copy()
        for column in range(part.shape[1]):
            part[:, column] = part[torch.randperm(len(part), generator=generator).numpy(), column]
        into[:, start:start + at_once] = part


def alike(groups: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[K]`: the largest cosine of each column of `groups [f, K]` with a column of each other, mean over the others."""
    own = groups / groups.norm(dim=0).clamp_min(1e-12)
    found = [(own.T @ (other / other.norm(dim=0).clamp_min(1e-12))).max(dim=1).values for other in others]
    return torch.stack(found).mean(dim=0)


def _blocks(data: npt.NDArray[np.float32]) -> Iterator[torch.Tensor]:
    for start in range(0, len(data), BLOCK):
        yield torch.from_numpy(np.ascontiguousarray(data[start:start + BLOCK]))
