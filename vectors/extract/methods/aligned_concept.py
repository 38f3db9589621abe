"""Concept vectors of all layers, made to agree with one another (the idea of GCAV, 2025, arXiv 2508.21197, without its
networks).

What the paper leaves open is decided here: a layer is mapped to a middle one by the orthogonal Procrustes rotation of
the centred train activations of the same texts (a map of the activations, which no label enters); the layers' concept
directions are compared and averaged there, weighted by what each adds to held-out separation (dev), and the average is
carried back to each layer. No autoencoder is trained and no score of consistency is optimised: lower variance over
layers is then not built in. Consistency is judged on test, as the agreement of the layers' scores of the same texts,
and counts only where the same made from shuffled labels stays at chance.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from steering.language.vocabulary import Site
from vectors.extract.answers import AnsweredOptions
from vectors.extract.contract import Split
from vectors.extract.contrastive import Contrastive
from vectors.extract.data import Dataset
from vectors.extract.methods.logistic_probe import LogisticProbe
from vectors.extract.methods.mean_difference import MeanDifference
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import FitFailed
from vectors.extract.scratch import Scratch
from vectors.extract.standing import auc, correlation, random_like, rounded, standing
from vectors.extract.subject import Subject, stream
from vectors.extract.text_pairs import TextPairs, paired
from vectors.extract.work import Work

SITE: Site = "resid_post"
Rows = Mapping[Split, torch.Tensor]


class AlignedConceptRequest(AnsweredOptions):
    """Contrastive pairs."""

    pairs: TextPairs
    direction: Literal["mean", "probe"] = Field(default="mean", description="How each layer's own direction is taken.")
    min_dev_auc: float = Field(default=0.6, ge=0.5, le=1, description="Layers whose own direction tells dev less well "
                               "than this get no weight in the average.")


class AlignedConcept(Recipe):
    name = "aligned_concept"
    summary = "one concept, a vector per layer, aligned across layers"
    request = AlignedConceptRequest
    ops = ("add",)
    sites = (SITE,)
    without_massive = True
    untried = "how far and at which layers to go is left to whoever steers; `trimtab tune` tries it on questions"

    def prepare(self, request: AlignedConceptRequest, subject: Subject) -> Dataset:
        site_layers(request, SITE, subject.facts)
        return paired(request.pairs, subject, request.seed)

    def make(self, request: AlignedConceptRequest, data: Dataset, work: Work) -> Made:
        layers = site_layers(request, SITE, work.facts)
        texts = [text for pair in data.pairs for text in (pair.positive, pair.negative)]
        method = MeanDifference() if request.direction == "mean" else LogisticProbe()
        norms = dict.fromkeys(layers, 0.0)
        with Scratch(layers, len(texts), work.facts.width(SITE)) as store:
            for n, found in stream(work.subject, texts, SITE, layers, [-1],
                                   work.within(0.0, 0.6, "capture"), without_massive=True):
                for layer in layers:
                    store.put(layer, n, found[layer][0])
                    norms[layer] += float(found[layer][0].norm()) / len(texts)
            # Positive texts first, then the negative ones, pair by pair.
            rows = {layer: {split: store.rows(layer, [*(2 * n for n in members), *(2 * n + 1 for n in members)])
                            for split, members in data.splits.items()} for layer in layers}
        reference = layers[len(layers) // 2]
        turns = {layer: rotation(rows[layer]["train"], rows[reference]["train"]) for layer in layers}

        own = {layer: _direction(method, rows[layer]["train"]) for layer in layers}
        fused = _fused(request, rows, turns, own)
        span, generator = work.within(0.65, 1.0, "control"), request.generator(1)
        before, after = _scores(rows, own), _scores(rows, fused)
        shuffled_auc, shuffled_agreement = [], []
        for n in range(request.draws):
            span(n / request.draws)
            order = torch.randperm(len(rows[reference]["train"]), generator=generator)
            dealt = {layer: _direction(method, rows[layer]["train"][order]) for layer in layers}
            scores = _scores(rows, _fused(request, rows, turns, dealt))
            shuffled_auc.append(scores["mean_auc"])
            shuffled_agreement.append(scores["agreement"])
        random_agreement = [_scores(rows, {layer: random_like(own[layer], generator) for layer in layers})["agreement"]
                            for _ in range(request.draws)]
        control = {"auc_vs_shuffled_labels": standing(after["mean_auc"], shuffled_auc),
                   "agreement_vs_random_vectors": standing(after["agreement"], random_agreement),
                   "agreement_of_shuffled_labels": standing(after["agreement"], shuffled_agreement)}
        report: dict[str, Any] = {
            "method": self.name, "site": SITE, "reference_layer": reference,
            "pairs": {split: len(members) for split, members in data.splits.items()},
            "before": before, "after": after,
            "cosine_in_shared_space": {"before": _shared_cosine(turns, own), "after": _shared_cosine(turns, fused)},
            "cosine_to_own": {str(n): rounded(float(_unit(own[n]) @ _unit(fused[n]))) for n in layers},
            "controls": control}
        best = max(layers, key=lambda layer: (_auc(rows[layer]["dev"], fused[layer]), layer))
        sigma = {n: float((rows[n]["train"] @ _unit(v)).std(correction=0)) for n, v in fused.items()}
        return Made(
            kind="vector", op="add", site=SITE, numbers={n: {"vector": v} for n, v in fused.items()},
            default_layers=[best], residual_norm=norms, sigma={n: s for n, s in sigma.items() if s > 0},
            sign_convention="positive strength moves towards the positive texts of the pairs", report=report,
            dev={"auc": rounded(_auc(rows[best]["dev"], fused[best]))},
            test={"auc": rounded(_auc(rows[best]["test"], fused[best]))},
            card={"agreement_before": before["agreement"], "agreement_after": after["agreement"],
                  "shuffled_percentile": control["auc_vs_shuffled_labels"]["percentile"],
                  "random_percentile": control["agreement_vs_random_vectors"]["percentile"]},
            data={"data_hash": data.digest, "num_pairs": len(data.pairs)})


def rotation(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Orthogonal `[d, d]` R with least squared error of `source @ R` to `target`, both centred and of equal size."""
    a, b = source - source.mean(dim=0), target - target.mean(dim=0)
    if not float(a.norm()) > 0 or not float(b.norm()) > 0:
        raise FitFailed("at a layer every text has the same activation", param="layers", fix="Leave that layer out.")
    left, _, right = torch.linalg.svd((a / a.norm()).T @ (b / b.norm()))
    turn: torch.Tensor = left @ right
    return turn


def _direction(method: Contrastive, train: torch.Tensor) -> torch.Tensor:
    """As long as the class means are apart along it."""
    half = len(train) // 2
    positive, negative = train[:half], train[half:]
    found = _unit(method.fit(positive, negative, torch.Generator().manual_seed(0)))
    apart = float((positive.mean(dim=0) - negative.mean(dim=0)) @ found)
    if not abs(apart) > 0:
        raise FitFailed("at a layer the classes have the same mean", param="layers", fix="Leave that layer out.")
    return found * apart


def _fused(request: AlignedConceptRequest, rows: Mapping[int, Rows], turns: Mapping[int, torch.Tensor],
           own: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The average direction of the shared space in each layer's own, as long as that layer's own direction."""
    weights = {layer: max(0.0, _auc(rows[layer]["dev"], vector) - request.min_dev_auc) for layer, vector in own.items()}
    if not any(weights.values()):
        # No layer is good enough: all count alike, and the scores will say that there is nothing.
        weights = dict.fromkeys(own, 1.0)
    shared = _unit(torch.stack([weights[n] * (_unit(v) @ turns[n]) for n, v in own.items()]).sum(dim=0))
    return {n: turns[n] @ shared * v.norm() for n, v in own.items()}


def _scores(rows: Mapping[int, Rows], vectors: Mapping[int, torch.Tensor]) -> dict[str, float]:
    """On test: mean and spread over layers of the AUC, and the mean correlation of any two layers' scores."""
    aucs = torch.tensor([_auc(rows[n]["test"], v) for n, v in vectors.items()])
    projected = [rows[n]["test"] @ v for n, v in vectors.items()]
    pairs = [(i, j) for i in range(len(projected)) for j in range(i)]
    agreement = sum(correlation(projected[i], projected[j]) for i, j in pairs) / len(pairs) if pairs else 1.0
    return {"mean_auc": rounded(float(aucs.mean())), "auc_std": rounded(float(aucs.std(correction=0))),
            "agreement": rounded(agreement)}


def _shared_cosine(turns: Mapping[int, torch.Tensor], vectors: Mapping[int, torch.Tensor]) -> float:
    """Mean cosine of any two layers' directions in the shared space."""
    turned = torch.stack([_unit(v @ turns[n]) for n, v in vectors.items()])
    count = len(turned)
    if count == 1:
        return 1.0
    return rounded((float((turned @ turned.T).sum()) - count) / (count * (count - 1)))


def _auc(rows: torch.Tensor, vector: torch.Tensor) -> float:
    half = len(rows) // 2
    projected: Sequence[torch.Tensor] = (rows[:half] @ vector, rows[half:] @ vector)
    return auc(*projected)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = vector / vector.norm()
    return unit


METHOD = AlignedConcept()
