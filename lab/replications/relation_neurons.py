"""Relation neurons: what a relation and the others lose as its neurons are switched off (Liu et al. 2025, arXiv
2502.17355)."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from lab.datasets import load
from lab.replications.chart import OURS, SECOND, spread, tidy
from lab.replications.common import Case, Document, Finding, Row, figures, mean, nothing
from vectors.extract.local import LocalSubject

RELATIONS = ("capital", "currency", "job", "pet")
SHARES = (0.05, 0.2, 0.4)


def cases(model: LocalSubject) -> Iterator[Case]:
    known = [{key: r[key] for key in ("text", "answer", "label", "item", "split")} for r in load("relations")
             if not r["held_out"]]
    for relation in RELATIONS:
        for share in SHARES:
            yield Case(name(relation, share), "relation_neurons", {"facts": known, "target": relation, "share": share})


def name(relation: str, share: float) -> str:
    return f"neurons-{relation}-{round(100 * share)}"


def measured(document: Document) -> list[float]:
    """The shares that the document holds for every relation."""
    return [share for share in SHARES if all(name(relation, share) in document["cases"] for relation in RELATIONS)]


def findings(document: Document) -> list[Finding]:
    lines = []
    for share in measured(document):
        effects = [document["cases"][name(relation, share)]["effect"] for relation in RELATIONS]
        drop = [e["target_logprob_drop"] for e in effects]
        others = mean([e["others_logprob_drop"]["found"] for e in effects])
        accuracy = [e["target_drop"] for e in effects]
        above = sum(d["found"] > d["max"] for d in drop)
        specific = sum(e["target_logprob_drop"]["found"] > e["others_logprob_drop"]["found"] for e in effects)
        lines.append(Finding(
            f"fall of log p(answer) with {share:.0%} of all units off, mean of {len(RELATIONS)} relations",
            f"{mean([d['found'] for d in drop]):.2f} nats, the other relations {others:.2f}; accuracy falls by "
            f"{mean([a['found'] for a in accuracy]):.2f}",
            f"matched random units: {mean([d['mean'] for d in drop]):.2f} nats, at most "
            f"{max(d['max'] for d in drop):.2f}; accuracy {mean([a['mean'] for a in accuracy]):.2f}",
            f"{above} of {len(drop)} relations fall further than every draw; {specific} fall further than the others."))
    smallest = measured(document)[0]
    read = [document["cases"][name(relation, smallest)] for relation in RELATIONS]
    matched = [r["controls"]["matched_random"] for r in read]
    lines.append(Finding(
        f"held-out average precision of the best {smallest:.0%} of units",
        ", ".join(f"{relation} {r['test']['average_precision']:.2f}" for relation, r in
                  zip(RELATIONS, read, strict=True)),
        f"matched random units: {figures(matched[0], '.2f')} (for {RELATIONS[0]}); base rate "
        f"{read[0]['base_rate']:.2f}",
        f"{sum(m['found'] > m['max'] for m in matched)} of {len(matched)} above every draw."))
    return lines


def draw(document: Document, figure: Figure) -> None:
    for axes, relation in zip(figure.subplots(1, len(RELATIONS), sharey=True), RELATIONS, strict=True):
        effects = [document["cases"][name(relation, share)]["effect"] for share in measured(document)]
        at = [100 * share for share in measured(document)]
        spread(axes, at, [e["target_logprob_drop"] for e in effects], "matched random")
        axes.plot(at, [e["target_logprob_drop"]["found"] for e in effects], "o-", color=OURS, label="this relation")
        axes.plot(at, [e["others_logprob_drop"]["found"] for e in effects], "x-", color=SECOND, label="the others")
        tidy(axes, title=relation, x="% of units off",
             y="fall of log p(answer), nats" if relation == RELATIONS[0] else "")


ROW = Row(
    "relation-neurons", "Relation neurons", "lab-dense",
    "Switching off the MLP units that respond to one relation costs that relation's facts, more the more are off, and "
    "random units do not (arXiv 2502.17355).",
    cases, nothing, findings, draw,
    judged="Falls are of the log-probability of the answer's first token. The last row is of whole answers, for "
           "one relation and the share that is bundled; of the others nothing is claimed beyond the first token.",
    bundled=("job-neurons",),
    notes="The paper takes about 1 % of the units of a model with 352 000 of them; this one has 2304, and 1 % of those "
          "do nothing. Splits are by entity: facts of one entity never stand on both sides.")
