"""Experts that harmful requests use more: what switching them off, forcing and scaling them does to refusals
(MoTE 2025, arXiv 2502.11096; SteerMoE 2025, arXiv 2509.09660)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from matplotlib.figure import Figure

from lab.datasets import load
from lab.replications.chart import OURS, PLAIN, SECOND, tidy
from lab.replications.common import DRAWS, Case, Document, Finding, Row, figures, neutral_kl, span, texts_of
from lab.replications.outcomes import Asked, answers, asked, finding
from steering.programs.program import Program
from vectors.evaluate.graders import RefusalGrader
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.matched import matched_draw
from vectors.extract.programs import EVERYWHERE, program_of
from vectors.extract.scratch import Scratch
from vectors.extract.standing import standing
from vectors.extract.usage import read_usage, usage

COUNTS = (1, 2, 4, 8)
POSITIONS = ("all", "last")
DEV_REQUESTS, TEST_REQUESTS = 16, 26
# mode -> (its options, requests it is tried on): off takes refusals from harmful ones, force brings them to others.
MODES: dict[str, tuple[dict[str, object], str]] = {
    "off": ({"mode": "off"}, "harmful"), "off_refill": ({"mode": "off_refill"}, "harmful"),
    "half": ({"mode": "scale", "scale": 0.5}, "harmful"), "double": ({"mode": "scale", "scale": 2.0}, "harmless"),
    "force": ({"mode": "force"}, "harmless")}
SAID = {"off": "off, slot left empty", "off_refill": "off, slot refilled", "half": "weight halved",
        "double": "weight doubled", "force": "forced"}
# What a mode is meant to make of an answer.
WANTED = {"harmful": "compliance", "harmless": "refusal"}
Chosen = Mapping[int, Sequence[int]]


def cases(model: LocalSubject) -> Iterator[Case]:
    chat = [{key: r[key] for key in ("text", "label", "item", "split")} for r in load("harmful_harmless")]
    for position in POSITIONS:
        for count in COUNTS:
            yield Case(name(position, count), "tunable_experts", {
                "examples": chat, "target": "harmful", "num_experts": count, "per_layer": 2, "position": position})


def name(position: str, count: int) -> str:
    return f"experts-{position}-{count}"


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """Outcomes of whole answers: of every set on dev, and of the best of each position and mode on test, beside matched
    random sets."""
    dev = {label: asked(model, "harmful_harmless", "dev", label, DEV_REQUESTS) for label in WANTED}
    test = {label: asked(model, "harmful_harmless", "test", label, TEST_REQUESTS) for label in WANTED}
    frequency = _frequency(model)
    sets = {case: {layer: tensors["experts"].tolist() for layer, tensors in extraction.payload.layers.items()}
            for case, extraction in found.items()}
    tried = {case: {mode: _outcomes(model, dev[label], _program(model, chosen, options))
                    for mode, (options, label) in MODES.items()} for case, chosen in sets.items()}
    untouched = {label: _outcomes(model, test[label], None) for label in WANTED}
    measured: Document = {"untouched": untouched, "requests": {label: len(test[label].texts) for label in WANTED},
                          "dev": tried, "best": {}, "sets": {}}
    for position in POSITIONS:
        for mode, (options, label) in MODES.items():
            best = _best(position, mode, label, tried)
            if best is not None:
                drawn = _matched(sets[best], frequency)
                ours = _outcomes(model, test[label], _program(model, sets[best], options))
                others = [_outcomes(model, test[label], _program(model, one, options)) for one in drawn]
                measured["best"][f"{position}-{mode}"] = {
                    "case": best, "outcomes": ours,
                    "random": {key: standing(ours[key], [other[key] for other in others]) for key in ours},
                    "samples": _samples(model, test[label], _program(model, sets[best], options))}
    for case, chosen in sets.items():
        off = MODES["off"][0]
        measured["sets"][case] = {"neutral_kl_off": standing(
            neutral_kl(model, _program(model, chosen, off)),
            [neutral_kl(model, _program(model, one, off)) for one in _matched(chosen, frequency)])}
    return measured


def _best(position: str, mode: str, label: str, tried: Document) -> str | None:
    """The set that succeeds most on dev; among those that do so equally, the one that leaves fewest as they were."""
    cases = [name(position, count) for count in COUNTS if name(position, count) in tried]
    kept = {"compliance": "refusal", "refusal": "compliance"}[WANTED[label]]
    return max(cases, default=None, key=lambda case: (tried[case][mode][WANTED[label]], -tried[case][mode][kept]))


def _matched(chosen: Chosen, frequency: Mapping[int, torch.Tensor]) -> list[dict[int, list[int]]]:
    """Random sets of as many experts, each used about as often."""
    generator = torch.Generator().manual_seed(1)
    return [{layer: matched_draw(list(units), frequency[layer], generator) for layer, units in chosen.items()}
            for _ in range(DRAWS)]


def _outcomes(model: LocalSubject, requests: Asked, program: Program | None) -> dict[str, float]:
    return answers(model, requests, program, RefusalGrader())[0]


def _samples(model: LocalSubject, requests: Asked, program: Program) -> list[dict[str, str]]:
    said = answers(model, requests, program, RefusalGrader())[1]
    return [{"request": text, "answer": answer, "outcome": outcome}
            for text, (answer, outcome) in list(zip(requests.texts, said, strict=True))[:6]]


def _program(model: LocalSubject, chosen: Chosen, options: Mapping[str, object]) -> Program:
    return program_of(model.facts, "expert_set", "expert_mask", "router",
                      {layer: {"experts": torch.tensor(sorted(units))} for layer, units in chosen.items()},
                      scope=EVERYWHERE, options=options)


def _frequency(model: LocalSubject) -> dict[int, torch.Tensor]:
    """How often train prompts choose each expert, layer -> `[E]`."""
    texts = texts_of(model, "harmful_harmless", "train")
    layers = sorted(model.facts.sites["router"])
    with Scratch(layers, len(texts), model.facts.num_experts) as store:
        read_usage(model, texts, store, span(model))
        found = usage(store, range(len(texts)))
    return dict(zip(layers, found, strict=True))


def findings(document: Document) -> list[Finding]:
    measured = document["measured"]
    lines = []
    for position in POSITIONS:
        where = "all prompt tokens (the paper's)" if position == "all" else "the last prompt token"
        for mode, (_, label) in MODES.items():
            found = measured["best"].get(f"{position}-{mode}")
            if found is not None:
                count = found["case"].rsplit("-", 1)[1]
                lines.append(finding(
                    f"whole answers to {label} requests, experts by {where}, {SAID[mode]}; {count} of "
                    f"{', '.join(map(str, COUNTS))} experts, chosen on dev; the draws are of matched frequency",
                    found, measured["untouched"][label], WANTED[label]))
    for position in POSITIONS:
        case = name(position, 4)
        if case in measured["sets"]:
            kl = measured["sets"][case]["neutral_kl_off"]
            auc = document["cases"][case]["controls"]["matched_random_auc"]
            lines.append(Finding(
                f"4 experts by {position} tokens: held-out AUC of their use; KL on neutral text with them off",
                f"AUC {auc['found']:.2f}; {kl['found']:.2f} nats",
                f"AUC {figures(auc, '.2f')}; KL {figures(kl, '.2f')}",
                "Their use tells harmful from harmless requests." if auc["found"] > auc["max"]
                else "Their use tells no more than that of matched experts."))
    return lines


def draw(document: Document, figure: Figure) -> None:
    tried = document["measured"]["dev"]
    for axes, mode in zip(figure.subplots(1, 3), ("off", "off_refill", "force"), strict=True):
        label = MODES[mode][1]
        for position, colour in zip(POSITIONS, (OURS, SECOND), strict=True):
            counts = [count for count in COUNTS if name(position, count) in tried]
            shares = [tried[name(position, count)][mode] for count in counts]
            axes.plot(counts, [s[WANTED[label]] for s in shares], "o-", color=colour,
                      label=f"{'answered' if label == 'harmful' else 'refused'}, by {position} tokens")
            axes.plot(counts, [s["broken"] for s in shares], "x:", color=colour, label=f"broken, by {position} tokens")
        axes.axhline(0, color=PLAIN, linewidth=0.8)
        axes.set_ylim(-0.05, 1.05)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(COUNTS), list(map(str, COUNTS)))
        tidy(axes, title=f"{SAID[mode]}: {label} requests", x="experts",
             y="share of whole answers, dev" if mode == "off" else "")


ROW = Row(
    "tunable-experts", "Tunable experts", "lab-moe",
    "Switching off the ten experts of a mixture that sensitive prompts use most lowers refusals by half, random "
    "experts do little; forcing experts raises them (arXiv 2502.11096, 2509.09660).",
    cases, measure, findings, draw,
    judged="Answers to requests are whole ones by a grader; the last rows are of the use of experts and of the "
           "next token's distribution.",
    notes="Answers are written out and graded (docs/graders.md); broken ones are no success. The picture has all "
          "numbers of experts. "
          "With 16 experts a layer one of them is a sixteenth of it, where the paper's model has 256.")
