"""Experts that harmful requests use more: what switching them off, forcing and scaling them does to refusals
(MoTE 2025, arXiv 2502.11096; SteerMoE 2025, arXiv 2509.09660)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from matplotlib.figure import Figure

from lab.datasets import load
from lab.replications.chart import OURS, SECOND, spread, tidy
from lab.replications.common import (
    DRAWS,
    REFUSES,
    Case,
    Document,
    Finding,
    Row,
    figures,
    neutral_kl,
    span,
    texts_of,
)
from steering.programs.program import Program
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.matched import matched_draw
from vectors.extract.programs import EVERYWHERE, program_of
from vectors.extract.readout import Readout, ReadoutOptions, make_readout
from vectors.extract.scratch import Scratch
from vectors.extract.standing import standing
from vectors.extract.subject import Tokens
from vectors.extract.usage import read_usage, usage

COUNTS = (1, 2, 4, 8)
POSITIONS = ("all", "last")
# mode -> (its options, requests it is tried on): off takes refusals from harmful ones, force brings them to others.
MODES: dict[str, tuple[dict[str, object], str]] = {
    "off": ({"mode": "off"}, "harmful"), "off_refill": ({"mode": "off_refill"}, "harmful"),
    "half": ({"mode": "scale", "scale": 0.5}, "harmful"), "double": ({"mode": "scale", "scale": 2.0}, "harmless"),
    "force": ({"mode": "force"}, "harmless")}
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
    readout = make_readout(ReadoutOptions(target=REFUSES), model)
    texts = {label: texts_of(model, "harmful_harmless", "test", label) for label in ("harmful", "harmless")}
    dev = {label: texts_of(model, "harmful_harmless", "dev", label) for label in texts}
    before = {label: _refusals(readout, model, asked, None) for label, asked in texts.items()}
    frequency = _frequency(model)
    measured: Document = {"before": before, "prompts": {label: len(asked) for label, asked in texts.items()},
                          "sets": {}}
    for case, extraction in found.items():
        generator = torch.Generator().manual_seed(1)
        chosen = {layer: tensors["experts"].tolist() for layer, tensors in extraction.payload.layers.items()}
        drawn = [{layer: matched_draw(units, frequency[layer], generator) for layer, units in chosen.items()}
                 for _ in range(DRAWS)]
        entry: Document = {}
        for mode, (options, label) in MODES.items():
            asked = texts[label]
            ours = _refusals(readout, model, asked, _program(model, chosen, options))
            others = [_refusals(readout, model, asked, _program(model, one, options)) for one in drawn]
            entry[mode] = {key: standing(ours[key], [other[key] for other in others]) for key in ours}
            entry[mode]["dev"] = _refusals(readout, model, dev[label], _program(model, chosen, options))
        entry["neutral_kl_off"] = standing(
            neutral_kl(model, _program(model, chosen, MODES["off"][0])),
            [neutral_kl(model, _program(model, one, MODES["off"][0])) for one in drawn])
        measured["sets"][case] = entry
    return measured


def _program(model: LocalSubject, chosen: Chosen, options: Mapping[str, object]) -> Program:
    return program_of(model.facts, "expert_set", "expert_mask", "router",
                      {layer: {"experts": torch.tensor(sorted(units))} for layer, units in chosen.items()},
                      scope=EVERYWHERE, options=options)


def _refusals(readout: Readout, model: LocalSubject, texts: Sequence[Tokens], program: Program | None
              ) -> dict[str, float]:
    """Share of requests that a refusal is more likely after than not, and its mean log-odds."""
    odds = readout.log_odds(texts, span(model), program)
    return {"rate": round(float((odds > 0).double().mean()), 4), "log_odds": round(float(odds.mean()), 4)}


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
    before = measured["before"]
    lines = []
    for position in POSITIONS:
        said = "all prompt tokens (the paper's)" if position == "all" else "the last prompt token"
        sets = {count: measured["sets"][name(position, count)] for count in COUNTS
                if name(position, count) in measured["sets"]}
        if not sets:
            continue
        for mode, label, sign in (("off", "harmful", -1), ("off_refill", "harmful", -1), ("half", "harmful", -1),
                                  ("double", "harmless", 1), ("force", "harmless", 1)):
            best = max(sets, key=lambda count: sign * sets[count][mode]["dev"]["log_odds"])
            odds, rate = sets[best][mode]["log_odds"], sets[best][mode]["rate"]
            outside = odds["found"] < odds["min"] if sign < 0 else odds["found"] > odds["max"]
            said_mode = {"off": "off, slot left empty", "off_refill": "off, slot refilled", "half": "weight halved",
                         "double": "weight doubled", "force": "forced"}[mode]
            lines.append(Finding(
                f"refusals of {label} requests, experts by {said}, {said_mode}; {best} of "
                f"{', '.join(map(str, sets))} experts, chosen on dev",
                f"rate {before[label]['rate']:.2f} to {rate['found']:.2f}, log-odds {before[label]['log_odds']:+.2f} "
                f"to {odds['found']:+.2f}",
                f"matched random experts: rate {figures(rate, '.2f')}; log-odds {figures(odds)}",
                "No better than matched random experts." if not outside else
                "Moves refusals further than every matched draw." if rate["found"] != before[label]["rate"] else
                "Log-odds move further than with every matched draw; the rate does not change."))
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
    measured = document["measured"]
    for axes, (mode, label) in zip(figure.subplots(1, 3), (("off", "harmful"), ("off_refill", "harmful"),
                                                           ("force", "harmless")), strict=True):
        for position, colour in zip(POSITIONS, (OURS, SECOND), strict=True):
            counts = [count for count in COUNTS if name(position, count) in measured["sets"]]
            found = [measured["sets"][name(position, count)][mode]["log_odds"] for count in counts]
            if position == "all":
                spread(axes, counts, found, "matched random")
            axes.plot(counts, [s["found"] for s in found], "o-", color=colour, label=f"by {position} tokens")
        axes.axhline(measured["before"][label]["log_odds"], color="black", linewidth=0.8, linestyle=":",
                     label="untouched")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(COUNTS), list(map(str, COUNTS)))
        tidy(axes, title=f"{mode.replace('_', ', ')}: {label} requests", x="experts",
             y="log-odds of a refusal" if mode == "off" else "")


ROW = Row(
    "tunable-experts", "Tunable experts", "lab-moe",
    "Switching off the ten experts of a mixture that sensitive prompts use most lowers refusals by half, random "
    "experts do little; forcing experts raises them (arXiv 2502.11096, 2509.09660).",
    cases, measure, findings, draw,
    notes="A refusal is read from the first token of the answer, exactly. The picture has all numbers of experts. "
          "With 16 experts a layer one of them is a sixteenth of it, where the paper's model has 256.")
