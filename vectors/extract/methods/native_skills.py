"""Model-native skills: orthogonal axes of sequence-level activations (Kang et al. 2026, arXiv 2604.17614).

What the paper leaves open is decided here: a sequence is the mean of its tokens but the first (or its last token);
dims whose mean square is over 2500 times the median dim's, and massive dims of the model, are set to zero, and length
is regressed out, before the axes are taken; an axis points to the side of its longer tail. The layer is the middle one
of those given: at the model's last one an axis could only act as a bias on the logits. `axis` makes a vector of one
axis, as long as its spread, for the op add; without it the whole basis is a subspace. Which axis helps is for a trial
on dev to say, not for variance.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from steering.artifacts.payload import Kind
from steering.language.fields import Model
from steering.language.vocabulary import Op, Site
from vectors.extract.answers import AnsweredOptions
from vectors.extract.contract import Split
from vectors.extract.items import Item, Label, digest_of, split_items
from vectors.extract.plain import massive_dims
from vectors.extract.recipe import Made, Recipe, site_layers
from vectors.extract.refusals import ConstantActivations, EmptyText, LeakingSplit, OneClass, TooFewExamples
from vectors.extract.scratch import Scratch
from vectors.extract.standing import auc, rounded, standing
from vectors.extract.subject import Prompt, Subject, Tokens, encoded, stream
from vectors.extract.work import Work

SITE: Site = "resid_post"
MASSIVE = 2500.0


class SkillSequence(Model):
    """A sequence, with its skill if one is known: labels are used for the report only."""

    text: Prompt = Field(description="Plain text, a conversation or token ids.")
    label: Label | None = Field(default=None, description="Genre or skill, for the report.")
    item: Item | None = Field(default=None, description="What it is about; sequences of one item share a split.")
    split: Split | None = Field(default=None, description="Fixed split; for all sequences or for none.")


class NativeSkillsRequest(AnsweredOptions):
    """Sequences of the model's domain."""

    sequences: Annotated[list[SkillSequence], Field(min_length=1, max_length=100_000)]
    pooling: Literal["mean", "last"] = Field(default="mean", description="How a sequence becomes one activation.")
    rank: int = Field(default=8, ge=1, le=256, description="Axes to keep.")
    regress_length: bool = Field(default=True, description="Take out what goes with the number of tokens.")
    axis: int | None = Field(default=None, ge=0, le=255, description="Make a vector of this axis for the op add.")


Sequences = tuple[list[Tokens], list[str] | None, dict[Split, tuple[int, ...]], str]
"""Texts, their labels if every one has one, splits, digest."""


class NativeSkills(Recipe):
    name = "native_skills"
    summary = "orthogonal axes along which whole sequences differ most"
    request = NativeSkillsRequest
    ops = ("add", "ablate",)
    sites = (SITE,)
    untried = "texts of a domain do not say what the model should write along or without their axes"

    def prepare(self, request: NativeSkillsRequest, subject: Subject) -> Sequences:
        site_layers(request, SITE, subject.facts)
        texts = [encoded(subject, s.text, ("sequences", n, "text")) for n, s in enumerate(request.sequences)]
        return texts, *_data(request, texts)

    def make(self, request: NativeSkillsRequest, data: Sequences, work: Work) -> Made:
        layers = site_layers(request, SITE, work.facts)
        layer = layers[len(layers) // 2]
        texts, labels, splits, digest = data
        fit = splits["train"]
        with Scratch([layer], len(texts), work.facts.d_model) as store:
            norm = 0.0
            positions = [-1] if request.pooling == "last" else None
            for n, found in stream(work.subject, texts, SITE, [layer], positions, work.within(0.0, 0.7, "capture")):
                h = found[layer][1:] if len(found[layer]) > 1 else found[layer]
                store.put(layer, n, h.mean(dim=0))
                norm += float(h.norm(dim=-1).mean()) / len(texts)
            rows, dev, test = (store.rows(layer, splits[split]) for split in ("train", "dev", "test"))
        work.at(0.75, "fit")
        lengths = torch.tensor([float(len(text)) for text in texts], dtype=torch.float64)
        middle = rows.mean(dim=0)
        large = torch.nonzero(rows.square().mean(dim=0) > MASSIVE * rows.square().mean(dim=0).median()).flatten()
        massive = torch.tensor(sorted({*large.tolist(), *massive_dims(work.facts, SITE, layer)}), dtype=torch.int64)
        size = lengths[list(fit)] if request.regress_length else None
        cleaned = clean(rows, massive, size)
        basis, spread = axes(cleaned, request.rank)
        total = float(cleaned.square().sum())
        generator = request.generator(1)
        order = torch.randperm(len(fit), generator=generator)
        halves = [axes(clean(rows[part], massive, None if size is None else size[part]), request.rank)[0]
                  for part in (order[:len(order) // 2], order[len(order) // 2:])]
        report: dict[str, Any] = {
            "method": self.name, "site": SITE, "layer": layer, "pooling": request.pooling,
            "sequences": {split: len(members) for split, members in splits.items()},
            "massive_dims_left_out": massive.tolist(),
            "explained": [rounded(float(s) ** 2 * len(fit) / total) for s in spread],
            "axis_std": [rounded(float(s)) for s in spread],
            # 1 for the same subspace; close eigenvalues mix axes, so single ones are not compared.
            "split_half_cosines": [rounded(float(c)) for c in torch.linalg.svdvals(halves[0] @ halves[1].T)],
            "random_half_cosines": [rounded(float(c)) for c in torch.linalg.svdvals(
                halves[0] @ _random_basis(work.facts.d_model, len(basis), generator).T)],
            "length_correlation": [rounded(c) for c in _correlations(test @ basis.T, lengths[list(splits["test"])])]}
        card: dict[str, Any] = {"rank": len(basis), "split_half": report["split_half_cosines"][0]}
        held_out: dict[str, dict[str, Any]] = {split: {"explained": rounded(explained(found - middle, basis))}
                                               for split, found in (("dev", dev), ("test", test))}
        if labels is not None:
            report["labels"], report["controls"] = _label_scores(
                test, basis, [labels[n] for n in splits["test"]], request.draws, generator, work)
            held_out["test"]["best_axis_auc"] = {name: entry["auc"] for name, entry in report["labels"].items()}
            held_out["dev"]["best_axis_auc"] = {
                name: rounded(score) for name, (score, _) in
                best_axes(dev @ basis.T, [labels[n] for n in splits["dev"]]).items()}
            card["random_percentile"] = report["controls"]["random_axes_of_the_subspace"]["percentile"]
        made = self._numbers(request, basis, spread, rows)
        return Made(kind=made[0], op=made[1], site=SITE, numbers={layer: made[2]}, report=report, card=card,
                    dev=held_out["dev"], test=held_out["test"], residual_norm={layer: norm},
                    sigma={layer: float(spread[request.axis])} if request.axis is not None else None,
                    sign_convention="an axis points to the side of its longer tail",
                    data={"data_hash": digest, "num_sequences": len(texts)})

    def _numbers(self, request: NativeSkillsRequest, basis: torch.Tensor, spread: torch.Tensor, rows: torch.Tensor
                 ) -> tuple[Kind, Op, dict[str, torch.Tensor]]:
        if request.axis is None:
            return "subspace", "ablate", {"basis": basis, "mean": rows.mean(dim=0)}
        if request.axis >= len(basis):
            raise TooFewExamples(f"axis {request.axis} does not exist; {len(basis)} were found", param="axis",
                                 fix="Give more sequences, a larger rank or a lower axis.")
        return "vector", "add", {"vector": basis[request.axis] * spread[request.axis]}


def clean(rows: torch.Tensor, massive: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Centred rows without massive dims and, if `lengths` are given, without their linear part in length."""
    out = rows - rows.mean(dim=0)
    out[:, massive] = 0.0
    if lengths is not None:
        x = lengths - lengths.mean()
        if float(x @ x) > 0:
            out = out - torch.outer(x, x @ out) / (x @ x)
    return out


def axes(rows: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(orthonormal axes `[r, d]`, standard deviation along each `[r]`) of centred rows, at most `rank`.

    Raises:
        ConstantActivations: nothing varies.
    """
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    count = min(rank, int((values > 1e-6 * max(float(values[0]), 1e-30)).sum()))
    if count == 0 or not float(values[0]) > 1e-6:
        raise ConstantActivations("every sequence has the same activation", param="sequences",
                                  fix="Give sequences that differ in more than length, or another layer.")
    basis = vectors[:count]
    skew = ((rows @ basis.T) ** 3).sum(dim=0)
    return basis * torch.where(skew < 0, -1.0, 1.0).unsqueeze(1), values[:count] / len(rows) ** 0.5


def _random_basis(width: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    orthonormal: torch.Tensor = torch.linalg.qr(drawn).Q
    return orthonormal.T


def _correlations(projections: torch.Tensor, other: torch.Tensor) -> list[float]:
    x, y = projections - projections.mean(dim=0), other - other.mean()
    size = x.norm(dim=0) * y.norm()
    return torch.where(size > 0, (y @ x) / size.clamp_min(1e-30), 0.0).tolist()


def explained(rows: torch.Tensor, basis: torch.Tensor) -> float:
    """Share of the square length of `rows [n, d]` that lies within the orthonormal axes `basis [r, d]`."""
    total = float(rows.square().sum())
    return float((rows @ basis.T).square().sum()) / total if total > 0 else 0.0


def best_axes(coordinates: torch.Tensor, labels: Sequence[str]) -> dict[str, tuple[float, int]]:
    """For each label the AUC of the axis that tells it best from the rest, and the axis. coordinates: `[n, r]`."""
    scores = {}
    for name in sorted(set(labels)) if len(set(labels)) > 1 else []:
        inside = torch.tensor([label == name for label in labels])
        aucs = [auc(axis[inside], axis[~inside]) for axis in coordinates.T]
        good = [max(a, 1 - a) for a in aucs]
        scores[name] = (max(good), good.index(max(good)))
    return scores


def _label_scores(test: torch.Tensor, basis: torch.Tensor, labels: Sequence[str], draws: int,
                  generator: torch.Generator, work: Work) -> tuple[dict[str, Any], dict[str, Any]]:
    """How well the best axis tells each label from the rest, against random orthonormal axes of the same subspace, and
    against dealt labels: what the best of so many axes reaches by luck."""
    projections = test @ basis.T
    found = best_axes(projections, labels)
    mean = sum(score for score, _ in found.values()) / len(found)
    rotated, dealt = [], []
    for n in range(draws):
        work.at(0.8 + 0.2 * n / draws, "control")
        turn = _random_basis(len(basis), len(basis), generator)
        turned = best_axes(projections @ turn.T, labels)
        rotated.append(sum(score for score, _ in turned.values()) / len(turned))
        order = torch.randperm(len(labels), generator=generator).tolist()
        shuffled = best_axes(projections, [labels[i] for i in order])
        dealt.append(sum(score for score, _ in shuffled.values()) / len(shuffled))
    return ({name: {"auc": rounded(score), "axis": axis} for name, (score, axis) in found.items()},
            {"random_axes_of_the_subspace": standing(mean, rotated), "shuffled_labels": standing(mean, dealt)})


def _data(request: NativeSkillsRequest, texts: Sequence[Tokens]
          ) -> tuple[list[str] | None, dict[Split, tuple[int, ...]], str]:
    """Labels if every sequence has one, splits, digest."""
    sequences = request.sequences
    items = [s.item if s.item is not None else f"#{n}" for n, s in enumerate(sequences)]
    seen: dict[Tokens, int] = {}
    for n, text in enumerate(texts):
        first = seen.setdefault(text, n)
        if items[first] != items[n]:
            raise LeakingSplit(f"the text repeats sequences[{first}], under another item", param=("sequences", n),
                               fix="Leave it out, or give both the same item.")
    given = [s.label for s in sequences if s.label is not None]
    if given and len(given) < len(sequences):
        raise EmptyText("some sequences have a label and some have not", param="sequences",
                        fix="Label all of them or none.")
    labels = given or None
    if labels is not None and len(set(labels)) < 2:
        raise OneClass("all sequences have the same label", param="sequences", fix="Leave the labels out.")
    splits = dict(split_items(items, [s.split for s in sequences], request.seed, "sequences", strata=labels))
    if labels is not None and len({labels[n] for n in splits["test"]}) < len(set(labels)):
        raise OneClass("the test split does not have sequences of every label", param="sequences",
                       fix="Give more sequences of each label.")
    return labels, splits, digest_of([texts, items, labels, {s: list(m) for s, m in splits.items()}])


METHOD = NativeSkills()
