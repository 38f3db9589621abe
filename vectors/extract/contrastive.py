"""Directions from contrastive pairs: one is fitted at each layer, and what the model writes decides where it acts.

The methods differ in `fit` alone. The positive class projects larger on the direction, whose length is the distance of
the class means along it, so that strength `raw` 1 carries the mean negative text onto the mean positive one. Held-out
scores of reading say that a direction tells the texts apart, which nearly every layer does; the trial says what
steering with it does, and gives it layers and strength. Without a trial, the layer that reads best is taken.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from steering.language.errors import InvalidRequest
from steering.language.strength import Strength
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from steering.ops import get_operation, operations
from steering.ops.base import RESIDUAL_SITES, VECTOR_SITES
from steering.programs.inline import parse_options
from vectors.extract.contract import Split, TokenPosition
from vectors.extract.contrasts import continuations_of, default_questions, given_questions, texts_of
from vectors.extract.controls import random_scores, shuffled_scores, summary
from vectors.extract.data import Dataset
from vectors.extract.fit import LayerFit, Sides, fit_layer
from vectors.extract.recipe import Made, Recipe, RecipeOptions, site_layers
from vectors.extract.refusals import ConstantActivations
from vectors.extract.scratch import Scratch
from vectors.extract.spans import differing
from vectors.extract.subject import Subject, stream
from vectors.extract.text_pairs import TextPairs, paired
from vectors.extract.trial import search
from vectors.extract.trial.effort import BUDGETS
from vectors.extract.trial.plan import Candidate, Question, TrialOptions, TrialPlan
from vectors.extract.work import Span, Work

Rows = Mapping[Split, Sides]


class ContrastiveRequest(RecipeOptions):
    """Pairs of texts that differ in the concept."""

    pairs: TextPairs
    site: Site = Field(default="resid_post", description="Where activations are read, and later changed.")
    token: TokenPosition = Field(
        default="differing", description="Which token of a text is read. differing: the mean of those in which the two "
        "texts of a pair differ, and in a trial also the last of them, whichever steers better; last_differing: that "
        "one; last: the text's last token, which in a chat is the mark that closes the turn; mean: all but the first, "
        "which many models use as a sink; or a position, negative ones counting from the end.")
    op: Op = Field(default="add", description="What the artifact is meant for: add, ablate or clamp.")
    options: dict[str, Any] = Field(default={}, description="Default options of that op.")
    trial: TrialOptions = Field(default=TrialOptions(), description="How layers and strength are chosen, for the op "
                                "add: by what the model writes.")


@dataclass(frozen=True)
class Pairs:
    """texts: positive and negative ones, None where they are token ids. questions: that the request gives."""

    data: Dataset
    texts: tuple[list[str], list[str]] | None
    questions: Sequence[Question]


@dataclass(frozen=True)
class Reading:
    """What was fitted to one choice of tokens. norms: mean length of what was read, by layer."""

    token: TokenPosition
    fits: list[LayerFit]
    controls: dict[int, dict[str, Any]]
    constant: list[int]
    shuffled: dict[str, Any]
    best: LayerFit
    norms: dict[int, float]

    def fit_at(self, layer: int) -> LayerFit:
        return next(fit for fit in self.fits if fit.layer == layer)


class Contrastive(Recipe):
    """A way to take a direction from the activations of pairs at one layer."""

    request = ContrastiveRequest
    ops = ("add", "ablate", "clamp")
    sites = VECTOR_SITES
    finishes = "trial"
    without_massive = True
    untried = "only a vector to add is tried by what the model writes, and only where there are texts or a grader"

    @abstractmethod
    def fit(self, positive: torch.Tensor, negative: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A direction `[d]` of any length and sign. positive, negative: `[num_pairs, d]` float64, row i is pair i.

        Raises:
            FitFailed: no direction was found.
        """

    def prepare(self, request: ContrastiveRequest, subject: Subject) -> Pairs:
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
        data = paired(request.pairs, subject, request.seed, token=request.token)
        return Pairs(data, texts_of(request.pairs, data), given_questions(request.trial, request.pairs, subject))

    def passes(self, request: ContrastiveRequest, data: Pairs, facts: ModelFacts) -> int:
        read = sum(len(pair.positive) + len(pair.negative) for pair in data.data.pairs)
        if not self._tried(request, data):
            return read
        length = read // (2 * len(data.data.pairs))
        # Classifying what was written reads it once more.
        budget = BUDGETS[request.trial.effort]
        return 2 * read + budget.work(length, length) + budget.completions * budget.tokens

    def _tried(self, request: ContrastiveRequest, data: Pairs) -> bool:
        """Whether there is a trial: something is added, and something tells what it did."""
        graded = request.trial.grader is not None or data.texts is not None
        return request.op == "add" and request.trial.effort != "none" and graded

    def make(self, request: ContrastiveRequest, data: Pairs, work: Work) -> Made:
        layers = site_layers(request, request.site, work.facts)
        tried = self._tried(request, data)
        share = 0.4 if tried else 1.0
        readings = self._readings(request, data.data, layers, tried, work, share)
        reading = readings[0]
        found = None
        if tried:
            span = work.within(share, 1.0, "trial")
            plan = self._plan(request, data, readings, work.subject)
            found = search.run(plan, work.subject, request.generator(3 << 16), span)
        place = None if found is None else found.place
        if place is not None:
            reading = next(one for one in readings if str(one.token) == place.candidate)
        best = reading.best if place is None else reading.fit_at(place.layers[len(place.layers) // 2])
        report = _report(request, self.name, data.data, reading, best)
        options = _op_options(request, best)
        acting = [best.layer] if place is None else list(place.layers)
        card = {"layers": acting, "coordinates": best.coordinates,
                "random_percentile": reading.controls[best.layer]["covariance"]["percentile"],
                "shuffled_percentile": reading.shuffled["percentile"]}
        if found is not None:
            report["trial"] = card["trial"] = found.card
        return Made(
            kind="vector", op=request.op, site=request.site,
            numbers={fit.layer: {"vector": fit.vector} for fit in reading.fits},
            # An op that is meant for all sites and layers takes one direction everywhere.
            default_layers=None if options.get("multi_site") else acting, options=options,
            strength=Strength(value=1.0 if found is None else found.strength),
            sign_convention="positive strength moves towards the positive texts of the pairs", report=report,
            dev=best.dev.as_dict(), test={"pairs": len(data.data.splits["test"]), **best.test.as_dict()}, card=card,
            data={"data_hash": data.data.digest, "num_pairs": len(data.data.pairs), "token": reading.token},
            residual_norm={fit.layer: reading.norms[fit.layer] for fit in reading.fits},
            sigma={fit.layer: fit.sigma for fit in reading.fits}, draft=None if found is None else found.draft)

    def _readings(self, request: ContrastiveRequest, data: Dataset, layers: Sequence[int], tried: bool, work: Work,
                  share: float) -> list[Reading]:
        """By choice of tokens: those asked for, and where these were left open, also the last differing token."""
        tokens: list[TokenPosition] = [request.token]
        if tried and "token" not in request.model_fields_set:
            tokens.append("last_differing")
        with ExitStack() as stack:
            stores = [stack.enter_context(Scratch(layers, 2 * len(data.pairs), work.facts.width(request.site)))
                      for _ in tokens]
            norms = _read(request, tokens, data, stores, work.within(0.0, 0.6 * share, "capture"))
            span = work.within(0.6 * share, share, "fit")
            return [self._reading(request, token, data, store, own, span.part(n, len(tokens)))
                    for n, (token, store, own) in enumerate(zip(tokens, stores, norms, strict=True))]

    def _reading(self, request: ContrastiveRequest, token: TokenPosition, data: Dataset, store: Scratch,
                 norms: dict[int, float], span: Span) -> Reading:
        def rows(layer: int) -> Rows:
            return {split: (store.rows(layer, [2 * n for n in members]),
                            store.rows(layer, [2 * n + 1 for n in members]))
                    for split, members in data.splits.items()}

        fits: list[LayerFit] = []
        controls: dict[int, dict[str, Any]] = {}
        constant: list[int] = []
        for done, layer in enumerate(store.layers):
            span(done / (len(store.layers) + 1))
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
        # Refits on dealt labels cost as much as the fit, so that they are made at the best layer only.
        own = rows(best.layer)
        draws = shuffled_scores(self.fit, own["train"], own["test"], request.generator((2 << 16) + best.layer),
                                request.draws, span.part(len(store.layers), len(store.layers) + 1))
        return Reading(token, fits, controls, constant, summary(best.test, draws), best, norms)

    def _plan(self, request: ContrastiveRequest, data: Pairs, readings: Sequence[Reading], subject: Subject
              ) -> TrialPlan:
        questions = data.questions or default_questions(request.trial, request.pairs, data.data, subject)
        positive, negative = data.texts or ([], [])
        return TrialPlan(
            options=request.trial, site=request.site, grader=request.trial.grader, positive=positive, negative=negative,
            candidates=[Candidate(str(one.token), {fit.layer: fit.vector for fit in one.fits}) for one in readings],
            scales=readings[0].norms, continuations=continuations_of(data.data), questions=questions,
            reading={str(one.token): {fit.layer: fit.dev.auc for fit in one.fits} for one in readings})


def _read(request: ContrastiveRequest, tokens: Sequence[TokenPosition], data: Dataset, stores: Sequence[Scratch],
          span: Span) -> list[dict[int, float]]:
    """Fill a store for each choice of tokens with one activation a text and layer, the positive text of pair n in row
    2 n. Returns, for each, the mean length of the activations that were read, before they were averaged, by layer."""
    texts = [ids for pair in data.pairs for ids in (pair.positive, pair.negative)]
    spans = [own for pair in data.pairs for own in differing(pair.positive, pair.negative)]
    layers = stores[0].layers
    totals = [torch.zeros(len(layers), dtype=torch.float64) for _ in tokens]
    counts = [0] * len(tokens)
    one = tokens[0]
    # One position for all texts need not bring the others along.
    positions = [-1 if one == "last" else one] if len(tokens) == 1 and (one == "last" or isinstance(one, int)) else None
    for n, found in stream(span.work.subject, texts, request.site, layers, positions, span,
                           param=lambda n: ("pairs", n // 2), without_massive=True):
        whole = torch.stack([found[layer] for layer in layers]).double()
        for i, token in enumerate(tokens):
            vectors = whole if positions is not None else whole[:, _positions(token, spans[n], whole.shape[1])]
            totals[i] += vectors.norm(dim=-1).sum(dim=1)
            counts[i] += vectors.shape[1]
            for layer, row in zip(layers, vectors.mean(dim=1), strict=True):
                stores[i].put(layer, n, row)
    return [{layer: float(size) / count for layer, size in zip(layers, total, strict=True)}
            for total, count in zip(totals, counts, strict=True)]


def _positions(token: TokenPosition, span: range, length: int) -> list[int]:
    if token == "differing":
        return list(span)
    if token == "last_differing":
        return [span[-1]]
    if token == "mean":
        # The first position is a sink in many models, and no text.
        return list(range(1, length)) or [0]
    return [length - 1 if token == "last" else int(token)]


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


def _report(request: ContrastiveRequest, method: str, data: Dataset, reading: Reading, best: LayerFit
            ) -> dict[str, Any]:
    """Scores per layer, as plain JSON data."""
    unit = torch.stack([fit.vector / fit.vector.norm() for fit in reading.fits])
    return {
        "method": method, "site": request.site, "token": reading.token, "best_layer": best.layer,
        "pairs": {split: len(members) for split, members in data.splits.items()},
        "layers": {str(fit.layer): {
            "dev": fit.dev.as_dict(), "test": fit.test.as_dict(), "norm": _rounded(float(fit.vector.norm())),
            "residual_norm": _rounded(reading.norms[fit.layer]), "sigma": _rounded(fit.sigma),
            "control": reading.controls[fit.layer]} for fit in reading.fits},
        "constant_layers": reading.constant,
        "shuffled_labels": {"layer": reading.best.layer, **reading.shuffled},
        "cosine": [[round(float(value), 3) for value in row] for row in unit @ unit.T],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
