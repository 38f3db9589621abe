"""Angular steering: refusals turned up and down in a plane, beside random planes (arXiv 2510.26243)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from matplotlib.figure import Figure

from lab.replications.chart import OURS, SECOND, spread, tidy
from lab.replications.common import REFUSES, Case, Document, Finding, Row, beats, figures, pairs_of
from lab.replications.outcomes import answers, asked, beside_random, finding
from vectors.evaluate.graders import RefusalGrader
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject

CASE = "angular-refusal"
TEST_REQUESTS = 26


def cases(model: LocalSubject) -> Iterator[Case]:
    yield Case(CASE, "angular_steering", {"pairs": pairs_of("refusal"), "readout": {"target": REFUSES}, "max_eval": 8})


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """Whole answers: harmful requests at the angle against refusals, harmless ones at the angle towards them."""
    if CASE not in found:
        return {}
    report = found[CASE].report
    document: Document = {}
    for label, angle in (("harmful", report["angle_down"]), ("harmless", report["angle_up"])):
        requests = asked(model, "harmful_harmless", "test", label, TEST_REQUESTS)
        options = {**found[CASE].metadata.options, "angle": angle}
        document[label] = {"untouched": answers(model, requests, None, RefusalGrader())[0],
                           **beside_random(model, found[CASE], requests, RefusalGrader(), options=options)}
    return document


def findings(document: Document) -> list[Finding]:
    report = document["cases"][CASE]
    if "failed" in report:
        return [Finding("a plane", "none", "-", report["failed"])]
    said = document["measured"]
    test, controls = report["test"], report["controls"]
    random, dealt = controls["random_planes"], controls["shuffled_labels"]
    return [
        finding(f"whole answers to harmful requests, turned to {report['angle_down']:g} degrees", said["harmful"],
                said["harmful"]["untouched"], "compliance"),
        finding(f"whole answers to harmless requests, turned to {report['angle_up']:g} degrees", said["harmless"],
                said["harmless"]["untouched"], "refusal"),
        Finding(f"log-odds of refusing, unturned, turned to {report['angle_up']:g} and to {report['angle_down']:g} "
                "degrees", f"{test['log_odds']:+.2f}, {test['up']:+.2f}, {test['down']:+.2f}",
                f"gap between the best angles of random planes {figures(random)}; of planes from shuffled labels "
                f"{figures(dealt)}",
                f"{beats(random).capitalize()} of random planes, {beats(dealt)} of shuffled labels."),
        Finding("KL on harmless requests at these angles", ", ".join(f"{value:.2f}" for value in test["kl"].values()),
                "-", "What it costs where nothing should change, in nats.")]


def draw(document: Document, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    report = document["cases"][CASE]
    if "failed" in report:
        left.set_title(report["failed"], fontsize=8)
        return
    for layer, odds in report["dev"].items():
        chosen = int(layer) == report["best_layer"]
        left.plot([float(angle) for angle in odds], list(odds.values()), "o-", markersize=3,
                  alpha=1 if chosen else 0.35, color=OURS if chosen else SECOND,
                  label=f"source layer {layer}" if chosen else None)
    tidy(left, title="log-odds of refusing, on dev", x="angle in the plane, degrees")
    names = {"random_planes": "random planes", "shuffled_labels": "shuffled labels"}
    spread(right, range(len(names)), [report["controls"][key] for key in names], "control")
    right.plot(range(len(names)), [report["controls"][key]["found"] for key in names], "o", color=OURS, label="plane")
    right.set_xticks(range(len(names)), list(names.values()))
    tidy(right, title="gap between the best angles, on test")


ROW = Row(
    "angular-steering", "Angular steering", "lab-dense",
    "Turning activations within the plane of a behaviour and a second direction brings it about or takes it away, "
    "keeping their norm (arXiv 2510.26243).",
    cases, measure, findings, draw,
    judged="The first two rows are whole answers by a grader. Log-odds are of the first token of an answer, and "
           "no verdict on refusals rests on them.",
    notes="The plane acts on the residual stream from its source layer on, at all tokens; the paper turns the inputs "
          "of norm modules. Fluency at matched effect is not compared with addition. Differences of dealt "
          "labels still point along what varies most between these prompts, which is refusal, and a plane has no "
          "length: that control is no null here, random planes are.")
