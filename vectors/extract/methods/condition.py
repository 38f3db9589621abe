"""Conditions for gates: a direction that tells prompts of a kind from others, with a threshold (CAST, Lee et al. 2024,
arXiv 2409.05907).

Labelled prompts are read at one site, as the gate will read them: the last token, or the mean of all but the first. Per
layer a direction is fitted on train and the threshold with the best F1 is searched on dev; the layer with the best dev
F1 (then AUC, then separation) is taken and test is read once. What the paper leaves open is decided here: every
threshold between two dev scores is tried (CAST's grid of 0 to 1 by .01 suits its own form only), of equally good ones
the middle of the widest gap is taken; the form linear opens above the threshold only, the two that CAST's search would
also turn round may open below it; the condition vector is the difference of means, as CAST's PCA of pairs needs pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from scipy.sparse import csr_matrix

from steering.language.gates import Reading
from steering.language.vocabulary import Direction, Site
from steering.programs.reading import Reader
from vectors.extract.items import Example, Examples, Label, Labelled, labelled
from vectors.extract.methods.logistic_probe import LogisticProbe
from vectors.extract.methods.mean_difference import MeanDifference
from vectors.extract.recipe import Made, Recipe, RecipeOptions, site_layers
from vectors.extract.refusals import FitFailed
from vectors.extract.scratch import Scratch
from vectors.extract.standing import auc, rounded, standing
from vectors.extract.subject import Subject, stream
from vectors.extract.work import Work
from vectors.extras import extra

Tensors = dict[str, torch.Tensor]


class ConditionRequest(RecipeOptions):
    """Prompts of the kind that the gate is to open for, and others."""

    examples: Examples
    target: Label = Field(description="The label of the kind; all other labels together are the rest.")
    site: Site = Field(default="resid_post", description="Where prompts are read.")
    pool: Literal["mean", "last"] = Field(default="mean", description="How a prompt's tokens become one activation.")
    form: Literal["linear", "cosine", "cast"] = Field(
        default="linear", description="linear: a probe, signed; cast: CAST's own, which is blind to the side.")
    direction: Literal["probe", "mean"] = Field(
        default="probe", description="Weights of a logistic regression, or the difference of means. Of form linear.")


@dataclass(frozen=True)
class Threshold:
    """value, side: the gate opens on that side of it. f1: of the scores it was searched on."""

    value: float
    side: Direction
    f1: float


class Condition(Recipe):
    name = "condition"
    summary = "probe and threshold that tell prompts of a kind from others: the condition of a gate"
    request = ConditionRequest
    ops = ("add",)
    sites = ()
    untried = "it is made to be read, as the condition of a gate"

    def prepare(self, request: ConditionRequest, subject: Subject) -> Labelled:
        site_layers(request, request.site, subject.facts)
        examples = [Example(text=e.text, label=e.label, item=e.item, split=e.split) for e in request.examples]
        return labelled(examples, subject, request.seed, target=request.target)

    def make(self, request: ConditionRequest, data: Labelled, work: Work) -> Made:
        layers = site_layers(request, request.site, work.facts)
        truth = torch.tensor([label == request.target for label in data.labels])
        members = {split: torch.tensor(found) for split, found in data.splits.items()}
        with Scratch(layers, len(data.texts), work.facts.width(request.site)) as store:
            norms = _read(request, data, layers, store, work)
            span = work.within(0.7, 0.8, "fit")
            fits: dict[int, tuple[Tensors, Threshold, float, float]] = {}
            for n, layer in enumerate(layers):
                span(n / len(layers))
                found = _fit(request, store, layer, members, truth, request.generator(layer))
                if found is not None:
                    scores = _scores(request, found[0], store.rows(layer, data.splits["dev"]))
                    labels = truth[members["dev"]]
                    fits[layer] = (*found, _auc(scores, labels, found[1].side), _separation(scores, labels))
            if not fits:
                raise FitFailed("at every layer all prompts read alike", param="pool", fix="Read another token.")
            best = max(fits, key=lambda layer: (fits[layer][1].f1, *fits[layer][2:]))
            tensors, threshold = fits[best][:2]
            test = store.rows(best, data.splits["test"])
            labels = truth[members["test"]]
            result = measured(_scores(request, tensors, test), labels, threshold)
            controls = self._controls(request, work, store, best, members, truth, data, result)
        report: dict[str, Any] = {
            "method": self.name, "site": request.site, "form": request.form, "pool": request.pool, "best_layer": best,
            "examples": data.counts(), "threshold": rounded(threshold.value), "side": threshold.side,
            "layers": {str(n): {"dev_f1": rounded(fit[1].f1), "dev_auc": rounded(fit[2]),
                                "dev_separation": rounded(fit[3])} for n, fit in fits.items()},
            "test": result, "controls": controls}
        linear = request.form == "linear"
        return Made(
            kind="probe" if linear else "vector", op="add", site=request.site, numbers={best: tensors},
            default_layers=[best], residual_norm={best: norms[best]}, report=report,
            reading=Reading(form=request.form, pool=request.pool, threshold=threshold.value, direction=threshold.side),
            sign_convention=f"larger: more like {request.target}"
                            + (", -1 and 1 are the means of the two classes" if linear else ""),
            dev={"f1": rounded(threshold.f1), "auc": rounded(fits[best][2])}, test=result,
            card={"threshold": rounded(threshold.value), "side": threshold.side,
                  "random_percentile": controls["random_directions"]["percentile"],
                  "shuffled_percentile": controls["shuffled_labels"]["percentile"],
                  "bag_of_tokens_f1": controls["bag_of_tokens"]["f1"]},
            data={"data_hash": data.digest, "num_examples": len(data.texts), "target": request.target})

    def _controls(self, request: ConditionRequest, work: Work, store: Scratch, layer: int,
                  members: dict[Any, torch.Tensor], truth: torch.Tensor, data: Labelled, result: dict[str, Any]
                  ) -> dict[str, Any]:
        """Test F1 of fits on dealt labels, of random directions, and of a rule on which tokens occur."""
        span, generator = work.within(0.8, 1.0, "control"), request.generator(1 << 12)
        rows = {split: store.rows(layer, found.tolist()) for split, found in members.items()}
        labels = truth[members["test"]]
        pooled = rows["train"] - rows["train"].mean(dim=0)
        shuffled: list[float] = []
        random: dict[str, list[float]] = {"random_directions": [], "random_from_covariance": []}
        for n in range(request.draws):
            span(n / request.draws)
            dealt = truth.clone()
            for split in ("train", "dev"):
                order = torch.randperm(len(members[split]), generator=generator)
                dealt[members[split]] = truth[members[split]][order]
            found = _fit(request, store, layer, members, dealt, generator)
            shuffled.append(0.0 if found is None else
                            measured(_scores(request, found[0], rows["test"]), labels, found[1])["f1"])
            isotropic = torch.randn(pooled.shape[1], generator=generator, dtype=torch.float64)
            # Harder to beat: where the kind of prompt is what varies most, such a draw is half an answer.
            natural = pooled.T @ torch.randn(len(pooled), generator=generator, dtype=torch.float64)
            for name, draw in (("random_directions", isotropic), ("random_from_covariance", natural)):
                direction = _oriented(request, draw, rows["train"], truth[members["train"]])
                limit = search(_scores(request, direction, rows["dev"]), truth[members["dev"]], _sides(request))
                random[name].append(0.0 if limit is None else
                                    measured(_scores(request, direction, rows["test"]), labels, limit)["f1"])
        share = float(labels.double().mean())
        return {"shuffled_labels": standing(result["f1"], shuffled),
                **{name: standing(result["f1"], draws) for name, draws in random.items()},
                "bag_of_tokens": _bag_of_tokens(data, members, truth),
                "always_open_f1": rounded(2 * share / (1 + share))}


def search(scores: torch.Tensor, labels: torch.Tensor, sides: Sequence[Direction]) -> Threshold | None:
    """The threshold with the best F1 for scores `[n]` of labels `[n]` (bool); None if all scores are equal."""
    values, order = scores.double().sort()
    hits = labels[order].double()
    gaps = values[1:] - values[:-1]
    if not bool((gaps > 0).any()):
        return None
    below = hits.cumsum(0)[:-1]
    positives, count = hits.sum(), torch.arange(1, len(values), dtype=torch.float64)
    best: tuple[float, float, Threshold] | None = None
    for side in sides:
        true = positives - below if side == "above" else below
        opened = len(values) - count if side == "above" else count
        f1 = torch.where(gaps > 0, 2 * true / (opened + positives), -1.0)
        # Of equally good thresholds the one in the widest gap: it leaves most room on both sides.
        place = max(range(len(f1)), key=lambda i: (round(float(f1[i]), 12), float(gaps[i])))
        value = float((values[place] + values[place + 1]) / 2)
        found = Threshold(value, side, float(f1[place]))
        if best is None or (found.f1, float(gaps[place])) > best[:2]:
            best = (found.f1, float(gaps[place]), found)
    return None if best is None else best[2]


def measured(scores: torch.Tensor, labels: torch.Tensor, threshold: Threshold) -> dict[str, Any]:
    """F1, precision, recall, accuracy of the gate, and the AUC of its score."""
    opened = scores > threshold.value if threshold.side == "above" else scores < threshold.value
    true = int((opened & labels).sum())
    return {"f1": rounded(2 * true / max(int(opened.sum()) + int(labels.sum()), 1)),
            "precision": rounded(true / max(int(opened.sum()), 1)), "recall": rounded(true / int(labels.sum())),
            "accuracy": rounded(float((opened == labels).double().mean())),
            "auc": rounded(_auc(scores, labels, threshold.side)), "prompts": len(labels)}


def _read(request: ConditionRequest, data: Labelled, layers: Sequence[int], store: Scratch, work: Work
          ) -> dict[int, float]:
    """Fill the store with one activation per prompt and layer; mean norm of what was stored, per layer."""
    norms = dict.fromkeys(layers, 0.0)
    positions = [-1] if request.pool == "last" else None
    # The other forms divide by the whole length of a token, whatever it is made of.
    for n, found in stream(work.subject, data.texts, request.site, layers, positions,
                           work.within(0.0, 0.7, "capture"), without_massive=request.form == "linear"):
        for layer, h in found.items():
            row = (h[1:] if request.pool == "mean" and len(h) > 1 else h).mean(dim=0)
            store.put(layer, n, row)
            norms[layer] += float(row.norm()) / len(data.texts)
    return norms


def _fit(request: ConditionRequest, store: Scratch, layer: int, members: dict[Any, torch.Tensor], truth: torch.Tensor,
         generator: torch.Generator) -> tuple[Tensors, Threshold] | None:
    """Numbers and threshold of one layer under the labels `truth`; None where nothing varies."""
    train, labels = store.rows(layer, members["train"].tolist()), truth[members["train"]]
    if float((train - train.mean(dim=0)).norm()) <= 1e-6 * float(train.norm()):
        return None
    method = LogisticProbe() if request.form == "linear" and request.direction == "probe" else MeanDifference()
    direction = method.fit(train[labels], train[~labels], generator)
    tensors = _oriented(request, direction, train, labels)
    scores = _scores(request, tensors, store.rows(layer, members["dev"].tolist()))
    threshold = search(scores, truth[members["dev"]], _sides(request))
    return None if threshold is None else (tensors, threshold)


def _oriented(request: ConditionRequest, direction: torch.Tensor, train: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """Numbers of the artifact for a direction: pointing to the target, of form linear with the class means at -1, 1."""
    along = train @ direction
    gap = float(along[labels].mean() - along[~labels].mean())
    if request.form != "linear":
        return {"vector": direction if gap >= 0 else -direction}
    scale = 2 / gap if gap else 1.0
    middle = float(along[labels].mean() + along[~labels].mean()) / 2
    return {"weight": scale * direction, "bias": torch.tensor(-scale * middle, dtype=torch.float64)}


def _scores(request: ConditionRequest, tensors: Tensors, rows: torch.Tensor) -> torch.Tensor:
    """Scores `[n]` of activations `[n, width]`, read as a gate reads them."""
    reader = Reader("", request.site, request.form, {0: {name: t.float() for name, t in tensors.items()}})
    return reader.scores(0, rows)


def _sides(request: ConditionRequest) -> tuple[Direction, ...]:
    return ("above",) if request.form == "linear" else ("above", "below")


def _auc(scores: torch.Tensor, labels: torch.Tensor, side: Direction) -> float:
    found = auc(scores[labels], scores[~labels])
    return found if side == "above" else 1 - found


def _separation(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Distance of the class means in within-class standard deviations: unlike F1 and AUC it does not saturate."""
    inside, outside = scores[labels].double(), scores[~labels].double()
    spread = ((inside.var(correction=0) + outside.var(correction=0)) / 2).sqrt().clamp_min(1e-12)
    return float((inside.mean() - outside.mean()).abs() / spread)


def _bag_of_tokens(data: Labelled, members: dict[Any, torch.Tensor], truth: torch.Tensor) -> dict[str, Any]:
    """The same task for a rule that sees only which tokens a prompt holds: what words alone give away."""
    vocabulary = {token: i for i, token in enumerate(sorted({t for n in members["train"].tolist()
                                                             for t in data.texts[n]}))}

    with extra("probes"):
        from sklearn.linear_model import LogisticRegression

    def features(split: str) -> csr_matrix:
        found = [(row, vocabulary[token]) for row, n in enumerate(members[split].tolist())
                 for token in set(data.texts[n]) if token in vocabulary]
        rows, columns = zip(*found, strict=True) if found else ((), ())
        return csr_matrix(([1.0] * len(found), (rows, columns)), shape=(len(members[split]), len(vocabulary)))

    rule = LogisticRegression(max_iter=2000).fit(features("train"), truth[members["train"]].numpy())
    scores = {split: torch.from_numpy(rule.decision_function(features(split))) for split in ("dev", "test")}
    threshold = search(scores["dev"], truth[members["dev"]], ("above",))
    if threshold is None:
        return {"f1": 0.0}
    return measured(scores["test"], truth[members["test"]], threshold)


METHOD = Condition()
