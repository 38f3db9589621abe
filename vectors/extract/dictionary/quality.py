"""What a dictionary is worth, on rows and texts that it was not trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steering.artifacts.dictionary import Dictionary
from steering.language.scope import Scope
from steering.language.vocabulary import Site
from steering.programs.program import Program
from vectors.extract.programs import program_of
from vectors.extract.standing import rounded, standing
from vectors.extract.subject import Tokens, batches
from vectors.extract.work import Span, Work

# A feature that is active on more tokens than this share is no sparse one.
DENSE = 0.2
# Features whose nearest one in another dictionary is as near as this are taken for the same.
SAME = 0.7
# Features of one dictionary that are compared with all of another.
COMPARED = 512
RIDGE = 1e-4
# A text's first token is left as it is: it was not trained on, and many models use it as a sink.
BEHIND_FIRST = Scope(prompt="none", generation="all")


def of_rows(numbers: Mapping[str, Tensor], dev: Tensor, test: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Figures on activations `[n, width]`.

    explained: share of test's variance round its mean. error_share: length of the error over that of the activation,
    the mean over tokens. l0: active features a token. dead: share of the features that are active on no token of test.
    dense: share that is on more than a fifth. predictable: share of the error's variance on test that a linear map of
    the activation explains, fitted on dev (Engels et al. 2024, arXiv 2410.14670); predictable_dealt: fitted to the
    errors of other tokens.
    """
    dictionary = Dictionary(numbers)
    active, l0 = torch.zeros(dictionary.num_features, dtype=torch.int64), 0
    for part in torch.split(test, 1024):
        on = dictionary.features(part) > 0
        active += on.sum(dim=0)
        l0 += int(on.sum())
    errors = {"dev": dev - dictionary.reconstruction(dev), "test": test - dictionary.reconstruction(test)}
    order = torch.randperm(len(dev), generator=generator)
    return {
        "explained": rounded(_explained(test, errors["test"])),
        "error_share": rounded(float((errors["test"].norm(dim=1) / test.norm(dim=1).clamp_min(1e-30)).mean())),
        "l0": rounded(l0 / len(test)), "dead": rounded(float((active == 0).double().mean())),
        "dense": rounded(float((active > DENSE * len(test)).double().mean())),
        "predictable": rounded(_predictable(dev, errors["dev"], test, errors["test"])),
        "predictable_dealt": rounded(_predictable(dev, errors["dev"][order], test, errors["test"]))}


def _explained(h: Tensor, error: Tensor) -> float:
    h = h.double()
    total = (h - h.mean(dim=0)).square().sum().clamp_min(1e-30)
    return float(1 - error.double().square().sum() / total)


def _predictable(x: Tensor, y: Tensor, held_out: Tensor, truth: Tensor) -> float:
    """Share of `truth`'s variance that a ridge regression of y on x explains there. Below 0 where the mean of y would
    do better."""
    x, y, held_out, truth = x.double(), y.double(), held_out.double(), truth.double()
    centre, middle = x.mean(dim=0), y.mean(dim=0)
    products = (x - centre).T @ (x - centre)
    products.diagonal().add_(RIDGE * products.diagonal().mean() + 1e-12)
    weights = torch.linalg.solve(products, (x - centre).T @ (y - middle))
    return _explained(truth, truth - middle - (held_out - centre) @ weights)


def stability(decoder: Tensor, other: Tensor, draws: int, generator: torch.Generator) -> dict[str, Any]:
    """How near the features of one dictionary are to their nearest ones in another, both `[m, width]`: the mean of the
    largest cosines (Sharkey et al. 2022), beside the same with the other's dims dealt, and the share over 0.7 (as in
    Paulo and Belrose 2025, arXiv 2501.16615)."""
    rows = _unit(decoder)[torch.randperm(len(decoder), generator=generator)[:COMPARED]]
    other = _unit(other)
    nearest = (rows @ other.T).amax(dim=1)
    dealt = [float((rows @ other[:, torch.randperm(other.shape[1], generator=generator)].T).amax(dim=1).mean())
             for _ in range(draws)]
    return {**standing(float(nearest.mean()), dealt), "same": rounded(float((nearest > SAME).double().mean()))}


def _unit(rows: Tensor) -> Tensor:
    scaled: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return scaled


def loss_recovered(work: Work, site: Site, layer: int, numbers: Mapping[str, Tensor], mean: Tensor,
                   texts: Sequence[Tokens], span: Span) -> dict[str, float]:
    """Cross-entropy of texts, nats a token, with the reconstruction in the place of the activation of every token but
    the first, and with their mean and with nothing there. recovered_of_mean, recovered_of_zero: the share of what the
    ablation costs that the reconstruction saves; 1 where it costs nothing."""
    width = work.facts.width(site)
    arms = {"clean": None,
            "spliced": program_of(work.facts, "sae", "sae", site, {layer: numbers}, scope=BEHIND_FIRST,
                                  options={"error": "drop"}),
            "mean": _constant(work, site, layer, mean), "zero": _constant(work, site, layer, torch.zeros(width))}
    losses = {}
    for n, (name, program) in enumerate(arms.items()):
        # The server's limit on relative steps is one for requests.
        free = None if program is None else replace(program, limited=False)
        losses[name] = _loss(work, texts, free, span.part(n, len(arms)))
    found = {name: rounded(loss) for name, loss in losses.items()}
    for name in ("mean", "zero"):
        cost = losses[name] - losses["clean"]
        found[f"recovered_of_{name}"] = rounded((losses[name] - losses["spliced"]) / cost) if cost > 0 else 0.0
    return found


def _constant(work: Work, site: Site, layer: int, values: Tensor) -> Program:
    return program_of(work.facts, "diagonal", "affine", site,
                      {layer: {"scale": torch.zeros(len(values)), "shift": values}}, scope=BEHIND_FIRST)


def _loss(work: Work, texts: Sequence[Tokens], program: Program | None, span: Span) -> float:
    total, count = 0.0, 0
    for batch in batches(texts):
        span(batch.start / len(texts))
        some = [texts[n] for n in batch]
        for text, logprob in zip(some, work.subject.continuation_logprobs(some, [1] * len(some), program), strict=True):
            total -= logprob * (len(text) - 1)
            count += len(text) - 1
    return total / count
