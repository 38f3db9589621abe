"""The diagonal tuned lens (Nadaf 2026, arXiv 2604.02608): does a scale and a shift of each dim make earlier layers
readable?
"""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from lab.datasets import load
from lab.replications.chart import CONTROL, OURS, PLAIN, SECOND, tidy
from lab.replications.common import Case, Document, Finding, Row, figures, mean, nothing
from vectors.extract.local import LocalSubject

CASE = "tuned-lens"


def cases(model: LocalSubject) -> Iterator[Case]:
    texts = [r["text"] for name in ("neutral", "harmful_harmless", "languages", "task_prompts", "relations")
             for r in load(name)[:80]]
    yield Case(CASE, "tuned_lens", {"prompts": list(dict.fromkeys(texts))})


def findings(document: Document) -> list[Finding]:
    report = document["cases"][CASE]
    layers, dealt = report["layers"], report["controls"]["dealt_dims"]
    tuned, logit = (mean([entry[f"{lens}_kl"] for entry in layers.values()]) for lens in ("tuned", "logit"))
    better = sum(entry["tuned_kl"] < entry["logit_kl"] for entry in layers.values())
    return [
        Finding("KL of the lens's next token from the model's, mean of layers below the last", f"{tuned:.2f} nats",
                f"logit lens {logit:.2f}", f"Nearer at {better} of {len(layers)} layers."),
        Finding(f"share of the last layer's variance foreseen at layer {report['controls']['layer']}",
                f"{dealt['found']:.2f}",
                f"fitted to other tokens "
                f"{layers[str(report['controls']['layer'])]['explained_other_tokens']:.2f}; dims "
                f"dealt anew {figures(dealt)}",
                "More than both controls." if dealt["found"] > dealt["max"] else "No more than its controls."),
    ]


def draw(document: Document, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    layers = document["cases"][CASE]["layers"]
    at = [int(layer) for layer in layers]
    for lens, colour in (("tuned", OURS), ("logit", SECOND)):
        left.plot(at, [entry[f"{lens}_kl"] for entry in layers.values()], "o-", color=colour, label=f"{lens} lens")
    tidy(left, title="KL from the model's next token (nats)", x="layer")
    for key, colour, label in (("explained", OURS, "tuned"), ("explained_untuned", SECOND, "as it is"),
                               ("explained_other_tokens", CONTROL, "fitted to other tokens")):
        right.plot(at, [entry[key] for entry in layers.values()], "o-", color=colour, label=label)
    right.axhline(0, color=PLAIN, linewidth=0.6)
    tidy(right, title="share of the last layer's variance", x="layer")


ROW = Row(
    "tuned-lens", "Tuned lens", "lab-dense",
    "A scale and shift per dim, fitted to the last layer, makes earlier layers readable, though it closes only 1 of 14 "
    "gaps between steering and reading (arXiv 2604.02608).",
    cases, nothing, findings, draw,
    judged="A lens reads the next token: this is no claim about what steering does.")
