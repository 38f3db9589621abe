"""Trying a manifold out on the model: swaps onto labels, and walks from label to label, by the distributions they
give.

A walk of `steps` points is replaced into the last prompt token of a base prompt one point at a time. Its energy is the
distance of the answers to the behaviour manifold, summed over the walk and scaled to 50 points, in nats (as in Wurgaft
et al. 2026, arXiv 2605.05115).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steering.artifacts.spline import Manifold
from steering.language.vocabulary import Site
from steering.programs.program import Program
from vectors.extract.behaviour import Answers, Behaviour
from vectors.extract.manifold_fit import Fit
from vectors.extract.programs import NEXT, program_of
from vectors.extract.subject import Tokens, answer_logprobs
from vectors.extract.work import Span, Work

POINTS = 50
SIGN_FLIPS = 9999


@dataclass(frozen=True)
class Trial:
    """One layer's manifold with the prompts it is tried on: token ids and the true value of each."""

    work: Work
    site: Site
    layer: int
    fit: Fit
    answers: Answers
    behaviour: Behaviour
    prompts: Sequence[Tokens]
    values: Sequence[int]

    def said(self, prompts: Sequence[Tokens], programs: Sequence[Program], span: Span) -> torch.Tensor:
        """Answer distributions `[n, w + 1]`."""
        logprobs = answer_logprobs(self.work.subject, prompts, span, programs, tokens=self.answers.tokens)
        return self.answers.distribution(logprobs)

    def putting(self, goal: torch.Tensor, basis: torch.Tensor | None = None) -> Program:
        """The last token's part in the subspace replaced by `goal [r]`; `basis`: of another subspace."""
        basis = self.fit.basis if basis is None else basis
        return program_of(self.work.facts, "subspace", "patch", self.site,
                          {self.layer: {"basis": basis, "mean": self.fit.mean + goal @ basis}}, scope=NEXT)

    def swaps(self, goals: torch.Tensor, span: Span, basis: torch.Tensor | None = None) -> tuple[float, float]:
        """Every prompt's state put on `goals [w, r]` of every other value: share of answers whose distribution is
        nearest to the natural one of that value, and mean probability of the value itself."""
        programs = [self.putting(goal, basis) for goal in goals]
        wanted = [(n, value) for n, own in enumerate(self.values) for value in range(len(goals)) if value != own]
        found = self.said([self.prompts[n] for n, _ in wanted], [programs[value] for _, value in wanted], span)
        target = torch.tensor([value for _, value in wanted])
        hits = self.behaviour.nearest_value(found) == target
        return float(hits.double().mean()), float(found.gather(1, target.unsqueeze(1)).mean())

    def walks(self, paths: Sequence[torch.Tensor], span: Span) -> torch.Tensor:
        """Answer distributions `[num_paths, num_prompts, steps, w + 1]` along paths of points `[steps, r]`."""
        programs, prompts = [], []
        for path in paths:
            along = [self.putting(point) for point in path]
            for prompt in self.prompts:
                programs += along
                prompts += [prompt] * len(along)
        return self.said(prompts, programs, span).view(len(paths), len(self.prompts), len(paths[0]), -1)

    def energies(self, walked: torch.Tensor) -> torch.Tensor:
        """Energy of every path `[num_paths]`, mean over prompts."""
        distance = self.behaviour.distance(walked.flatten(0, 2)).view(walked.shape[:3])
        energies: torch.Tensor = POINTS * distance.mean(dim=(1, 2))
        return energies


def along_manifold(manifold: Manifold, knots: torch.Tensor, steps: int) -> Callable[[int, int], torch.Tensor]:
    """Points `[steps, r]` from label a to label b on the manifold; `knots [w]`: the knot of each label."""
    def path(a: int, b: int) -> torch.Tensor:
        start, stop = (manifold.knots[knots[n]].unsqueeze(0) for n in (a, b))
        return manifold.at(torch.cat([manifold.way(start, stop, t / (steps - 1)) for t in range(steps)]))

    return path


def along_chord(fit: Fit, steps: int) -> Callable[[int, int], torch.Tensor]:
    """The straight line between the centroids."""
    share = torch.linspace(0, 1, steps, dtype=torch.float64).unsqueeze(1)

    def path(a: int, b: int) -> torch.Tensor:
        points: torch.Tensor = (1 - share) * fit.centroids[a] + share * fit.centroids[b]
        return points

    return path


def as_long_as(chord: Callable[[int, int], torch.Tensor], other: Callable[[int, int], torch.Tensor]
               ) -> Callable[[int, int], torch.Tensor]:
    """The chord with every point as far from the mean activation as the other path's: what length alone does."""
    def path(a: int, b: int) -> torch.Tensor:
        points, wanted = chord(a, b), other(a, b).norm(dim=1, keepdim=True)
        scaled: torch.Tensor = points * wanted / points.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return scaled

    return path


def sign_flip_p(difference: torch.Tensor, generator: torch.Generator) -> float:
    """Chance that pairs `[n]` with signs dealt at random have a mean at most as low, the true signs counted in."""
    signs = torch.randint(0, 2, (SIGN_FLIPS, len(difference)), generator=generator).double() * 2 - 1
    drawn = (signs * difference).mean(dim=1)
    return float((int((drawn <= difference.mean() + 1e-12).sum()) + 1) / (SIGN_FLIPS + 1))


def by_distance(energies: dict[str, torch.Tensor], far: torch.Tensor) -> dict[str, Any]:
    """Mean energy and its standard error per path kind, for pairs `far [n]` apart."""
    table: dict[str, Any] = {}
    for distance in sorted(set(far.tolist())):
        chosen = far == distance
        table[str(distance)] = {"pairs": int(chosen.sum()), **{
            name: {"mean": round(float(values[chosen].mean()), 4),
                   "se": round(float(values[chosen].std(correction=0)) / max(1, int(chosen.sum())) ** 0.5, 4)}
            for name, values in energies.items()}}
    return table
