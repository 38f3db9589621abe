"""Concept vectors aligned across layers: do the layers agree more, and is that worth anything (after GCAV, arXiv
2508.21197)."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from lab.replications.chart import CONTROL, OURS, SECOND, THIRD, bars, tidy
from lab.replications.common import Case, Document, Finding, Row, figures, mean, nothing, pairs_of
from vectors.extract.local import LocalSubject

CONCEPTS = ("sentiment", "tense", "emotions", "language_french")


def cases(model: LocalSubject) -> Iterator[Case]:
    for concept in CONCEPTS:
        yield Case(name(concept), "aligned_concept", {"pairs": pairs_of(concept)})


def name(concept: str) -> str:
    return f"aligned-{concept.replace('_', '-')}"


def findings(document: Document) -> list[Finding]:
    reports = [document["cases"][name(concept)] for concept in CONCEPTS]
    before, after = ({key: mean([r[side][key] for r in reports]) for key in ("agreement", "mean_auc", "auc_std")}
                     for side in ("before", "after"))
    dealt = mean([r["controls"]["agreement_of_shuffled_labels"]["mean"] for r in reports])
    random = mean([r["controls"]["agreement_vs_random_vectors"]["mean"] for r in reports])
    auc = [r["controls"]["auc_vs_shuffled_labels"] for r in reports]
    return [
        Finding(f"agreement of the layers' scores of the same texts, mean of {len(reports)} concepts, before and after",
                f"{before['agreement']:.3f}, {after['agreement']:.3f}",
                f"after alignment, shuffled labels {dealt:.3f}; random vectors {random:.3f}",
                ("Agreement rises. " if after["agreement"] > before["agreement"] else "Agreement does not rise. ")
                + ("Shuffled labels agree nearly as well: the alignment makes any direction agree, so agreement is no "
                   "evidence of a concept." if dealt > after["agreement"] - 0.1 else "Shuffled labels agree less.")),
        Finding("held-out AUC, mean of layers, before and after", f"{before['mean_auc']:.3f}, {after['mean_auc']:.3f}",
                f"shuffled labels {figures(auc[0], '.2f')} ({CONCEPTS[0]})",
                f"{sum(a['found'] > a['max'] for a in auc)} of {len(auc)} above every draw; the alignment "
                + ("costs nothing." if after["mean_auc"] >= before["mean_auc"] - 0.005 else "costs some.")),
        Finding("spread of the AUC over layers, before and after",
                f"{before['auc_std']:.3f}, {after['auc_std']:.3f}", "-",
                "Steadier across layers." if after["auc_std"] < before["auc_std"] - 0.002
                else "As steady as before: each layer alone reads these concepts well already."),
    ]


def draw(document: Document, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    reports = [document["cases"][name(concept)] for concept in CONCEPTS]
    labels = [concept.replace("_", " ") for concept in CONCEPTS]
    bars(left, labels, {
        "before": [r["before"]["agreement"] for r in reports], "after": [r["after"]["agreement"] for r in reports],
        "after, shuffled labels": [r["controls"]["agreement_of_shuffled_labels"]["mean"] for r in reports],
        "random vectors": [r["controls"]["agreement_vs_random_vectors"]["mean"] for r in reports]},
        [THIRD, OURS, SECOND, CONTROL])
    left.set_ylim(top=1.35)
    tidy(left, title="agreement of layers")
    bars(right, labels, {
        "before": [r["before"]["mean_auc"] for r in reports], "after": [r["after"]["mean_auc"] for r in reports],
        "shuffled labels": [r["controls"]["auc_vs_shuffled_labels"]["mean"] for r in reports]}, [THIRD, OURS, SECOND])
    right.set_ylim(0, 1.35)
    tidy(right, title="held-out AUC, mean of layers")


ROW = Row(
    "aligned-concepts", "Concept vectors aligned across layers", "lab-dense",
    "Aligned into one shared space, the concept vectors of all layers give consistent scores (GCAV, arXiv 2508.21197).",
    cases, nothing, findings, draw,
    judged="Scores of texts that are read, and nothing that is written: this is no claim about what steering "
           "does.",
    notes="Without the paper's networks: layers are mapped by the orthogonal Procrustes rotation of the same texts, "
          "which no label enters.")
