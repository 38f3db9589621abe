"""What a manifold does when answers are moved along it: swaps and walks, beside what stands for no manifold.

Swaps put the centroid of another value in place of the activation's own part of the subspace, and are compared with
centroids of dealt labels and with random subspaces of the same rank. Walks go from one value to another along the
manifold, and are compared with the chord, the chord at the manifold's distance from the mean, and splines through dealt
knots.
"""

from dataclasses import replace
from typing import Any, Protocol

import torch

from vectors.extract.manifold_fit import Layout, chosen_pairs, means_by_label, shuffled
from vectors.extract.manifold_trial import (
    Trial,
    along_chord,
    along_manifold,
    as_long_as,
    by_distance,
    sign_flip_p,
)
from vectors.extract.standing import rounded, share_error, standing
from vectors.extract.work import Span


class Effort(Protocol):
    """How much is tried. draws: controls of each kind; steps: points of a walk; max_pairs: walks."""

    @property
    def draws(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def max_pairs(self) -> int: ...

    @property
    def labels(self) -> list[str]: ...

    def generator(self, salt: int) -> torch.Generator: ...


def dev_swaps(trial: Trial, span: Span) -> dict[str, float]:
    swap, mass = trial.swaps(trial.fit.centroids, span)
    return {"swap": rounded(swap), "target_mass": rounded(mass)}


def dev_walks(trial: Trial, request: Effort, layout: Layout, span: Span) -> dict[str, float]:
    """The energy of a few walks."""
    own = torch.arange(len(trial.fit.centroids))
    path = along_manifold(trial.fit.manifold, own, min(request.steps, 6))
    pairs = chosen_pairs(layout, min(request.max_pairs, 8), request.generator(1000))
    return {"energy": rounded(float(trial.energies(trial.walks([path(a, b) for a, b in pairs], span)).mean()))}


def swaps(trial: Trial, request: Effort, rows: torch.Tensor, values: torch.Tensor, span: Span
           ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Swaps on test, and what centroids of dealt labels and other subspaces do."""
    generator, count = request.generator(1001), 2 * request.draws + 2
    centroids = trial.fit.centroids
    swap, mass = trial.swaps(centroids, span.part(0, count))
    nothing = trial.swaps(torch.zeros_like(centroids), span.part(1, count))[0]
    raw = means_by_label(rows - trial.fit.mean, values, len(centroids))
    inside = trial.fit.inside(rows)
    dealt, elsewhere = [], []
    for n in range(request.draws):
        order = torch.randperm(len(values), generator=generator)
        dealt.append(trial.swaps(means_by_label(inside, values[order], len(centroids)), span.part(2 * n + 2, count))[0])
        draw = torch.randn(raw.shape[1], len(trial.fit.basis), generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(draw).Q.T.contiguous()
        elsewhere.append(trial.swaps(raw @ basis.T, span.part(2 * n + 3, count), basis)[0])
    made = len(trial.prompts) * (len(centroids) - 1)
    return ({"swap": rounded(swap), "swap_error": rounded(share_error(swap, made)), "target_mass": rounded(mass),
             "mean_instead": rounded(nothing),
             "swaps": made},
            {"shuffled_labels": standing(swap, dealt), "random_subspaces": standing(swap, elsewhere)})


def walks(trial: Trial, request: Effort, layout: Layout, span: Span
           ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Energies of walks on test by distance; the longest walk written out; where the energy (less is better: with its
    sign turned) stands among those of splines with dealt knots."""
    made, steps = trial.fit, request.steps
    pairs = chosen_pairs(layout, request.max_pairs, request.generator(1002))
    far = torch.tensor([max(1, round(float(layout.distances()[a, b]))) for a, b in pairs])
    manifold = along_manifold(made.manifold, torch.arange(len(made.centroids)), steps)
    chord = along_chord(made, steps)
    kinds = {"manifold": manifold, "chord": chord, "norm_matched_chord": as_long_as(chord, manifold)}
    count = len(kinds) + request.draws
    walked = {name: trial.walks([path(a, b) for a, b in pairs], span.part(n, count))
              for n, (name, path) in enumerate(kinds.items())}
    energies = {name: trial.energies(found) for name, found in walked.items()}
    generator = request.generator(1003)
    # Dealt knots are walked from half of the prompts, and compared with the manifold from the same ones.
    few = fewer(trial)
    same = few.energies(walked["manifold"][:, :len(few.prompts)])
    drawn = []
    for n in range(request.draws):
        path = along_manifold(*shuffled(made, generator), steps)
        drawn.append(few.energies(few.walks([path(a, b) for a, b in pairs], span.part(len(kinds) + n, count))))
    energies["shuffled_knots"] = torch.stack(drawn).mean(dim=0)
    away = far > 1 if bool((far > 1).any()) else far > 0
    means = {name: rounded(float(values[away].mean())) for name, values in energies.items()}
    ends = max(range(len(pairs)), key=lambda n: int(far[n]))
    return (
        {"pairs": len(pairs), "steps": steps, "prompts": len(trial.prompts), "by_distance": by_distance(energies, far),
         "far": means,
         "p_below": {name: rounded(sign_flip_p(
             ((same if name == "shuffled_knots" else energies["manifold"]) - values)[away], generator))
                     for name, values in energies.items() if name != "manifold"},
         "peak_other": {name: rounded(float(found[..., -1].amax(dim=2).mean())) for name, found in walked.items()}},
        {"source": request.labels[pairs[ends][0]], "target": request.labels[pairs[ends][1]],
         **{name: [[round(float(p), 4) for p in step] for step in walked[name][ends].mean(dim=0)]
            for name in ("manifold", "chord")}},
        standing(-float(same[away].mean()), [-float(values[away].mean()) for values in drawn]))


def fewer(trial: Trial) -> Trial:
    """The same from half of the prompts, one at least."""
    count = (len(trial.prompts) + 1) // 2
    return replace(trial, prompts=trial.prompts[:count], values=trial.values[:count])
