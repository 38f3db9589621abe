"""Directions from contrastive pairs: one is fitted at each layer, one layer is chosen on dev and reported on test.

The methods differ in `fit` alone. The positive class projects larger on the direction, whose length is the distance of
the class means along it, so that strength `raw` 1 carries the mean negative text onto the mean positive one.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from steering.language.errors import InvalidRequest
from steering.language.vocabulary import Op, Site
from steering.ops.base import RESIDUAL_SITES, VECTOR_SITES, get_operation, operations
from steering.programs.inline import parse_options
from vectors.extract.contract import Split, TokenPosition
from vectors.extract.controls import random_scores, shuffled_scores, summary
from vectors.extract.data import Dataset
from vectors.extract.fit import LayerFit, Sides, fit_layer
from vectors.extract.recipe import Made, Recipe, RecipeOptions, site_layers
from vectors.extract.refusals import ConstantActivations
from vectors.extract.scratch import Scratch
from vectors.extract.subject import Subject, stream
from vectors.extract.text_pairs import TextPairs, paired
from vectors.extract.work import Span, Work

Rows = Mapping[Split, Sides]


class ContrastiveRequest(RecipeOptions):
    """Pairs of texts that differ in the concept."""

    pairs: TextPairs
    site: Site = Field(default="resid_post", description="Where activations are read, and later changed.")
    token: TokenPosition = Field(
        default="last", description="Token to read: last, mean (all but the first, which many models use as a sink), "
        "or a position; negative ones count from the end.")
    op: Op = Field(default="add", description="What the artifact is meant for: add, ablate or clamp.")
    options: dict[str, Any] = Field(default={}, description="Default options of that op.")


class Contrastive(Recipe):
    """A way to take a direction from the activations of pairs at one layer."""

    request = ContrastiveRequest
    ops = ("add", "ablate", "clamp")
    sites = VECTOR_SITES

    @abstractmethod
    def fit(self, positive: torch.Tensor, negative: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A direction `[d]` of any length and sign. positive, negative: `[num_pairs, d]` float64, row i is pair i.

        Raises:
            FitFailed: no direction was found.
        """

    def prepare(self, request: ContrastiveRequest, subject: Subject) -> Dataset:
        """Raises InvalidRequest: a site that holds no vector, an op that takes none, or options that the op lacks."""
        if request.site not in VECTOR_SITES:
            raise InvalidRequest(f"no direction can be taken at {request.site}", param="site",
                                 fix=f"Use one of {', '.join(VECTOR_SITES)}.")
        if "vector" not in get_operation(request.op).kinds:
            takers = [operation.name for operation in operations() if "vector" in operation.kinds]
            raise InvalidRequest(f"the op {request.op} does not take a vector", param="op",
                                 fix=f"Use one of {', '.join(takers)}.")
        if request.options:
            parse_options(get_operation(request.op), request.options)
        site_layers(request, request.site, subject.facts)
        return paired(request.pairs, subject, request.seed, token=request.token)

    def make(self, request: ContrastiveRequest, data: Dataset, work: Work) -> Made:
        layers = site_layers(request, request.site, work.facts)
        with Scratch(layers, 2 * len(data.pairs), work.facts.width(request.site)) as store:
            norms = _read(request, data, store, work.within(0.0, 0.6, "capture"))

            def rows(layer: int) -> Rows:
                return {split: (store.rows(layer, [2 * n for n in members]),
                                store.rows(layer, [2 * n + 1 for n in members]))
                        for split, members in data.splits.items()}

            fits: list[LayerFit] = []
            controls: dict[int, dict[str, Any]] = {}
            constant: list[int] = []
            span = work.within(0.6, 0.9, "fit")
            for done, layer in enumerate(layers):
                span(done / len(layers))
                found = rows(layer)
                try:
                    fits.append(fit_layer(self.fit, layer, found, request.generator(layer)))
                except ConstantActivations:
                    # "all" may contain such a layer without anyone having asked for it; a named one must not be lost.
                    if request.layers != "all":
                        raise
                    constant.append(layer)
                    continue
                controls[layer] = _random(request, fits[-1], found)
            if not fits:
                raise ConstantActivations("at every layer all texts have the same activation", param="token",
                                          fix="Read another token: the texts end alike and nothing before differs.")
            best = max(fits, key=lambda fit: (fit.dev.auc, fit.dev.separation))
            shuffled = self._shuffled(request, best, rows(best.layer), work.within(0.9, 1.0, "control"))
        report = _report(request, self.name, data, fits, best, norms)
        for layer, control in controls.items():
            report["layers"][str(layer)]["control"] = control
        report |= {"constant_layers": constant, "shuffled_labels": {"layer": best.layer, **shuffled}}
        options = _op_options(request, best)
        return Made(
            kind="vector", op=request.op, site=request.site, numbers={fit.layer: {"vector": fit.vector}
                                                                      for fit in fits},
            # An op that is meant for all sites and layers takes one direction everywhere.
            default_layers=None if options.get("multi_site") else [best.layer], options=options,
            sign_convention="positive strength moves towards the positive texts of the pairs", report=report,
            dev=best.dev.as_dict(), test={"pairs": len(data.splits["test"]), **best.test.as_dict()},
            card={"layers": [best.layer], "coordinates": best.coordinates,
                  "random_percentile": controls[best.layer]["covariance"]["percentile"],
                  "shuffled_percentile": shuffled["percentile"]},
            data={"data_hash": data.digest, "num_pairs": len(data.pairs), "token": request.token},
            residual_norm={fit.layer: norms[fit.layer] for fit in fits},
            sigma={fit.layer: fit.sigma for fit in fits})

    def _shuffled(self, request: ContrastiveRequest, best: LayerFit, rows: Rows, span: Span) -> dict[str, Any]:
        """Refits on dealt labels cost as much as the fit, so that they are made at the best layer only."""
        draws = shuffled_scores(self.fit, rows["train"], rows["test"], request.generator((2 << 16) + best.layer),
                                request.draws, span)
        return summary(best.test, draws)


def _read(request: ContrastiveRequest, data: Dataset, store: Scratch, span: Span) -> dict[int, float]:
    """Fill the store with one activation a text and layer, the positive text of pair n in row 2 n; return the mean
    length of the activations that were read, before pooling, by layer."""
    texts = [ids for pair in data.pairs for ids in (pair.positive, pair.negative)]
    positions = None if request.token == "mean" else [-1 if request.token == "last" else request.token]
    total, count = torch.zeros(len(store.layers), dtype=torch.float64), 0
    for n, found in stream(span.work.subject, texts, request.site, store.layers, positions, span,
                           param=lambda n: ("pairs", n // 2)):
        vectors = torch.stack([found[layer] for layer in store.layers]).double()
        if request.token == "mean" and vectors.shape[1] > 1:
            # The first position is a sink in many models, and no text.
            vectors = vectors[:, 1:]
        total += vectors.norm(dim=-1).sum(dim=1)
        count += vectors.shape[1]
        for layer, row in zip(store.layers, vectors.mean(dim=1), strict=True):
            store.put(layer, n, row)
    return {layer: float(size) / count for layer, size in zip(store.layers, total, strict=True)}


def _random(request: ContrastiveRequest, fit: LayerFit, rows: Rows) -> dict[str, Any]:
    generator = request.generator((1 << 16) + fit.layer)
    return {name: summary(fit.test, random_scores(rows["train"], rows["test"], generator, request.draws,
                                                  covariance=name == "covariance"))
            for name in ("isotropic", "covariance")}


def _op_options(request: ContrastiveRequest, best: LayerFit) -> dict[str, Any]:
    options = dict(request.options)
    if request.op == "ablate" and not options and request.site in RESIDUAL_SITES:
        options = {"multi_site": True}
    if request.op == "clamp" and not options:
        # What the positive texts have on average; the card names the range of both sides.
        options = {"value": best.coordinates["positive"]["mean"]}
    if options.get("multi_site"):
        # One direction at every site and layer is what makes this the refusal-direction method.
        options.setdefault("source_layer", best.layer)
    return options


def _report(request: ContrastiveRequest, method: str, data: Dataset, fits: Sequence[LayerFit], best: LayerFit,
            norms: Mapping[int, float]) -> dict[str, Any]:
    """Scores per layer, as plain JSON data."""
    unit = torch.stack([fit.vector / fit.vector.norm() for fit in fits])
    return {
        "method": method, "site": request.site, "token": request.token, "best_layer": best.layer,
        "pairs": {split: len(members) for split, members in data.splits.items()},
        "layers": {str(fit.layer): {
            "dev": fit.dev.as_dict(), "test": fit.test.as_dict(), "norm": _rounded(float(fit.vector.norm())),
            "residual_norm": _rounded(norms[fit.layer]), "sigma": _rounded(fit.sigma)} for fit in fits},
        "cosine": [[round(float(value), 3) for value in row] for row in unit @ unit.T],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
