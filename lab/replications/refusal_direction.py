"""The refusal direction, chosen by effect: ablated it stops refusals, added it brings them about (Arditi et al. 2024,
arXiv 2406.11717)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from matplotlib.figure import Figure

from lab.replications.chart import CONTROL, OURS, SECOND, spread, tidy
from lab.replications.common import REFUSES, Case, Document, Finding, Row, beats, figures, pairs_of
from lab.replications.outcomes import answers, asked, beside_random, finding
from vectors.evaluate.graders import RefusalGrader
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject

CASE = "refusal-direction"
MAX_KL = 0.3
TEST_REQUESTS = 26


def cases(model: LocalSubject) -> Iterator[Case]:
    # Harmless requests have six ways to begin an answer, between which the model wavers: no candidate of the last token
    # keeps within the paper's 0.1 nats.
    yield Case(CASE, "refusal_direction", {"pairs": pairs_of("refusal"), "readout": {"target": REFUSES},
                                           "num_positions": 1, "max_kl": MAX_KL})


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """Whole answers to harmful requests with the direction ablated, and to harmless ones with it added."""
    if CASE not in found:
        return {}
    layer = found[CASE].report["best_layer"]
    ways = {"harmful": {}, "harmless": {"op": "add", "layers": [layer], "options": {}}}
    requests = {label: asked(model, "harmful_harmless", "test", label, TEST_REQUESTS) for label in ways}
    return {label: {"untouched": answers(model, requests[label], None, RefusalGrader())[0],
                    **beside_random(model, found[CASE], requests[label], RefusalGrader(), **fields)}
            for label, fields in ways.items()}


def findings(document: Document) -> list[Finding]:
    report = document["cases"][CASE]
    if "failed" in report:
        return [Finding("a direction that passes the selection rule", "none", "-", report["failed"])]
    said = document["measured"]
    test, controls = report["test"], report["controls"]
    random, dealt, induced = (controls[key] for key in ("ablation_vs_random", "ablation_vs_shuffled",
                                                        "induction_vs_random"))
    return [
        finding("whole answers to harmful requests with the direction ablated", said["harmful"],
                said["harmful"]["untouched"], "compliance"),
        finding("whole answers to harmless requests with it added", said["harmless"], said["harmless"]["untouched"],
                "refusal"),
        Finding("log-odds of refusing harmful requests, before and with the direction ablated",
                f"{test['positive_log_odds']:+.2f} to {test['positive_ablated']:+.2f}",
                f"fall with random directions {figures(random)}; from shuffled labels {figures(dealt)}",
                f"{beats(random).capitalize()} of random directions, {beats(dealt)} of shuffled labels."),
        Finding("log-odds of refusing harmless requests, before and with it added",
                f"{test['negative_log_odds']:+.2f} to {test['negative_induced']:+.2f}",
                f"rise with random directions {figures(induced)}", f"{beats(induced).capitalize()}."),
        Finding("KL on harmless requests with it ablated", f"{test['negative_kl']:.2f} nats",
                f"the paper's bound 0.1, here {MAX_KL}",
                "Within the paper's bound." if test["negative_kl"] <= 0.1 else "More than the paper allows."),
    ]


def draw(document: Document, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    report = document["cases"][CASE]
    if "failed" in report:
        left.set_title(report["failed"], fontsize=8)
        return
    controls = report["controls"]
    names = {"ablation_vs_random": "ablated,\nrandom", "ablation_vs_shuffled": "ablated,\nshuffled labels",
             "induction_vs_random": "added,\nrandom"}
    spread(left, range(len(names)), [controls[key] for key in names], "control")
    left.plot(range(len(names)), [controls[key]["found"] for key in names], "o", color=OURS, label="direction")
    left.axhline(0, color=CONTROL, linewidth=0.8)
    left.set_xticks(range(len(names)), list(names.values()))
    tidy(left, title="change of log-odds, wanted way up")
    allowed = [c for c in report["candidates"] if c["allowed"]]
    other = [c for c in report["candidates"] if not c["allowed"]]
    for some, colour, label in ((allowed, OURS, "allowed"), (other, SECOND, "refused by the rule")):
        right.scatter([c["kl"] for c in some], [c["ablated"] for c in some], color=colour, label=label)
        for c in some:
            right.annotate(f"layer {c['layer']}", (c["kl"], c["ablated"]), fontsize=7, xytext=(4, 3),
                           textcoords="offset points")
    tidy(right, title="candidates on dev", x="KL on harmless requests", y="log-odds of refusing, ablated")


ROW = Row(
    "refusal-direction", "Refusal direction", "lab-dense",
    "One direction, chosen by effect, mediates refusal: ablated, harmful requests are answered; added, harmless ones "
    "are refused (arXiv 2406.11717).",
    cases, measure, findings, draw,
    judged="The first two rows are whole answers by a grader. Log-odds are of the first token of an answer, and "
           "no verdict on refusals rests on them.",
    notes="`max_kl` was raised from 0.1 when nothing passed on dev. A shuffled fit can by luck keep some of the "
          "direction, and ablation does not ask how long it is.")
