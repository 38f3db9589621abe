"""Attention heads: shifts at the heads that a probe reads, and heads without which answers are lost (Li et al. 2023,
arXiv 2306.03341; Merullo et al. 2024, arXiv 2310.08744)."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from lab.corpus.emotion_tables import NEUTRAL
from lab.corpus.emotions import EMOTIONS
from lab.datasets import load
from lab.replications.chart import OURS, SECOND, spread, tidy
from lab.replications.common import REFUSES, Case, Document, Finding, Row, beats, figures, nothing, pairs_of
from vectors.extract.local import LocalSubject

SHIFTS = {"refusal": REFUSES, "emotions": [f" {word}" for word in EMOTIONS]}
OTHERS = {"refusal": [], "emotions": [f" {NEUTRAL}"]}
READ_ONLY = ("sentiment",)
SIGMAS = 4.0
COUNTS = (1, 2, 3, 4, 6)


def cases(model: LocalSubject) -> Iterator[Case]:
    for concept, target in SHIFTS.items():
        yield Case(f"heads-{concept}", "head_shift", {
            "pairs": pairs_of(concept), "share": 0.15, "strength": SIGMAS,
            "readout": {"target": target, "others": OTHERS[concept]}})
    for concept in READ_ONLY:
        yield Case(f"heads-{concept}", "head_shift", {"pairs": pairs_of(concept), "share": 0.15, "strength": SIGMAS})
    shots = [{key: r[key] for key in ("text", "answer", "item", "split")} for r in load("task_prompts")
             if r["shots"] == 5]
    for count in COUNTS:
        yield Case(f"heads-in-context-{count}", "head_ablation", {"examples": shots, "num_heads": count,
                                                                  "max_eval": 80})


def findings(document: Document) -> list[Finding]:
    lines = []
    for concept in (*SHIFTS, *READ_ONLY):
        report = document["cases"][f"heads-{concept}"]
        heads, dealt = report["controls"]["random_heads"], report["controls"]["shuffled_labels"]
        lines.append(Finding(
            f"{concept}: probe accuracy at the {len(report['heads'])} chosen heads", f"{heads['found']:.2f}",
            f"random heads {figures(heads, '.2f')}; shuffled labels {figures(dealt, '.2f')}",
            f"{beats(heads).capitalize()} of random heads."))
        if "effect" in report:
            effect = report["effect"]
            toward, elsewhere = effect["toward"], effect["toward_vs_other_heads"]
            works = toward["found"] > toward["max"] and elsewhere["found"] > elsewhere["max"]
            lines.append(Finding(
                f"{concept}: change of log-odds after negative texts, shifts of {SIGMAS:g} sigma toward",
                f"{toward['found']:+.2f} (away {effect['away']:+.2f})",
                f"random directions there {figures(toward)}; other heads {figures(elsewhere)}",
                "Steers: above every draw of both controls." if works else
                f"Does not steer beyond its controls ({beats(toward)} of directions, {beats(elsewhere)} of heads)."))
    for count in COUNTS:
        report = document["cases"][f"heads-in-context-{count}"]
        drop = report["controls"]["random_heads"]["accuracy_drop"]
        lines.append(Finding(
            f"5-shot accuracy lost with {count} head{'s' if count > 1 else ''} off", f"{drop['found']:.2f}",
            f"random other heads {figures(drop, '.2f')}",
            "More than any random set." if drop["found"] > drop["max"] else "No more than random heads."))
    return lines


def draw(document: Document, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    effects = {concept: document["cases"][f"heads-{concept}"]["effect"] for concept in SHIFTS}
    at = list(range(len(effects)))
    spread(left, [x - 0.15 for x in at], [e["toward"] for e in effects.values()], "random directions")
    left.vlines([x + 0.15 for x in at], [e["toward_vs_other_heads"]["min"] for e in effects.values()],
                [e["toward_vs_other_heads"]["max"] for e in effects.values()], color=SECOND, alpha=0.5, linewidth=6,
                label="other heads, range")
    left.plot(at, [e["toward"]["found"] for e in effects.values()], "o", color=OURS, label="toward")
    left.plot(at, [e["away"] for e in effects.values()], "v", color=OURS, label="away")
    left.axhline(0, color="black", linewidth=0.6)
    left.set_xticks(at, list(effects))
    left.set_xlim(-0.6, len(at) - 0.4)
    tidy(left, title=f"change of log-odds, {SIGMAS:g} sigma")
    drops = [document["cases"][f"heads-in-context-{count}"]["controls"]["random_heads"]["accuracy_drop"]
             for count in COUNTS]
    spread(right, COUNTS, drops, "random other heads")
    right.plot(COUNTS, [d["found"] for d in drops], "o-", color=OURS, label="ranked heads")
    tidy(right, title="5-shot accuracy lost", x="heads off")


ROW = Row(
    "attention-heads", "Attention heads", "lab-dense",
    "Shifting the few heads from which a probe reads a concept moves the model (arXiv 2306.03341); a few heads carry "
    "in-context answers, and without them those are lost (arXiv 2310.08744).",
    cases, nothing, findings, draw,
    judged="Probes are of texts that are read. Log-odds are of the next token, and accuracy after five examples "
           "is of the answer's first token; the last row is of whole answers. That shifts of heads steer is not "
           "claimed.",
    bundled=("in-context-heads",),
    notes="The paper's strength of 15 sigma is for 48 of 1024 heads; here 4 of 24 are shifted by 4 sigma. The heads to "
          "switch off are ranked one by one on train and dev; random sets avoid them and keep to their layers as far "
          "as those have other heads.")
