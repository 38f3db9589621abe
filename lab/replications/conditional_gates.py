"""Conditions for gates: does a probe of the prompt tell when to steer (CAST, methods/20b)."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from lab.datasets import load
from lab.replications.chart import CONTROL, OURS, PLAIN, SECOND, spread, tidy
from lab.replications.common import Case, Document, Finding, Row, beats, figures, nothing
from vectors.extract.local import LocalSubject

FORMS = [(form, pool) for form in ("linear", "cast") for pool in ("last", "mean")]


def cases(model: LocalSubject) -> Iterator[Case]:
    chat = [{key: r[key] for key in ("text", "label", "item", "split")} for r in load("harmful_harmless")]
    for form, pool in FORMS:
        yield Case(name(form, pool), "condition", {"examples": chat, "target": "harmful", "form": form, "pool": pool})


def name(form: str, pool: str) -> str:
    return f"gate-harmful-{form}-{pool}"


def findings(document: Document) -> list[Finding]:
    lines = []
    for form, pool in FORMS:
        report = document["cases"][name(form, pool)]
        if "failed" in report:
            lines.append(Finding(f"F1 of the gate, {form}, {pool}", "none", "-", report["failed"]))
            continue
        controls = report["controls"]
        dealt, random, natural = (controls[key] for key in ("shuffled_labels", "random_directions",
                                                            "random_from_covariance"))
        bag = controls["bag_of_tokens"]["f1"]
        lines.append(Finding(
            f"F1 on harmful requests of test, form {form}, read at "
            f"{'the last token' if pool == 'last' else 'all tokens'}",
            f"{report['test']['f1']:.2f} (AUC {report['test']['auc']:.2f})",
            f"random directions {figures(random, '.2f')}; from the activations' covariance {figures(natural, '.2f')}; "
            f"shuffled labels mean {dealt['mean']:.2f}; which tokens occur {bag:.2f}; always open "
            f"{controls['always_open_f1']:.2f}",
            f"{beats(random).capitalize()} of random directions, {beats(natural)} from the covariance; "
            + ("better than the words alone." if report["test"]["f1"] > bag + 0.02 else
               "no better than the words alone.")))
    return lines


def draw(document: Document, figure: Figure) -> None:
    axes = figure.subplots()
    found = {f"{form}, {pool}": document["cases"][name(form, pool)] for form, pool in FORMS
             if "failed" not in document["cases"][name(form, pool)]}
    at = list(range(len(found)))
    spread(axes, [x - 0.1 for x in at], [r["controls"]["random_directions"] for r in found.values()],
           "random directions")
    dealt = [r["controls"]["shuffled_labels"] for r in found.values()]
    axes.vlines([x + 0.1 for x in at], [s["min"] for s in dealt], [s["max"] for s in dealt], color=SECOND, alpha=0.5,
                linewidth=6, label="shuffled labels, range")
    axes.plot(at, [r["test"]["f1"] for r in found.values()], "o", color=OURS, label="gate")
    axes.plot(at, [r["controls"]["bag_of_tokens"]["f1"] for r in found.values()], "x", color=PLAIN,
              label="which tokens occur")
    axes.plot(at, [r["controls"]["always_open_f1"] for r in found.values()], "_", color=CONTROL, markersize=18,
              label="always open")
    axes.set_xticks(at, list(found))
    axes.set_xlim(-0.5, len(at) + 0.6)
    tidy(axes, title="F1 of the condition on test")


ROW = Row(
    "conditional-gates", "Conditional gates", "lab-dense",
    "A direction and a threshold read from the prompt tell when to steer (CAST, arXiv 2409.05907).",
    cases, nothing, findings, draw)
