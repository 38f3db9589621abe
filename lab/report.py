"""`python -m lab.report`: measure both committed models and write lab/REPORT.md."""

from __future__ import annotations

import json

from transformers import AutoConfig

from lab.calling import scores as calling
from lab.evaluate import Reader, Score, evaluate
from lab.experts import Specialisation, specialisation
from lab.paths import LAB_DIR, MODEL_NAMES, TOOLS_MODEL, model_path

ITEMS = 200  # per skill; finite sets (calendar pairs, facts) are tested whole


def bar_of(score: Score) -> str:
    if score.low is not None and score.high is not None:
        return f"{score.low:.2f} to {score.high:.2f}"
    if score.low is not None:
        return f"at least {score.low:.2f}"
    return f"at most {score.high:.2f}" if score.high is not None else "no bar"


def verdict(score: Score) -> str:
    return {True: "met", False: "**missed**", None: "-"}[score.met]


def table(scores: dict[str, list[Score]]) -> list[str]:
    """One row per score, both models side by side."""
    names = list(scores)
    heads = " | ".join(f"{n} | bar met" for n in names)
    lines = [f"| skill | what is measured | bar | items | {heads} |",
        "|---|---|---|---|" + "---|---|" * len(names)]
    for row in zip(*scores.values(), strict=True):
        first = row[0]
        cells = " | ".join(f"{s.value:.3f} | {verdict(s)}" for s in row)
        lines.append(f"| {first.skill} | {first.what} | {bar_of(first)} | {first.items} | {cells} |")
    return lines


def details(scores: dict[str, list[Score]]) -> list[str]:
    """The shares by sub-skill that a single number hides."""
    lines = []
    for row in zip(*scores.values(), strict=True):
        if not row[0].detail:
            continue
        lines += ["", f"**{row[0].skill}: {row[0].what}**", "",
                  "| part | " + " | ".join(scores) + " |", "|---|" + "---|" * len(scores)]
        for part in row[0].detail:
            cells = " | ".join(f"{s.detail[part]:.3f}" for s in row)
            lines.append(f"| {part} | {cells} |")
    return lines


def architecture(readers: dict[str, Reader]) -> list[str]:
    lines = ["| | " + " | ".join(MODEL_NAMES) + " |", "|---|" + "---|" * len(MODEL_NAMES)]
    configs = [AutoConfig.from_pretrained(model_path(n)) for n in MODEL_NAMES]
    logs = [json.loads((model_path(n) / "training.json").read_text()) for n in MODEL_NAMES]

    def row(name: str, values: list[object]) -> None:
        lines.append(f"| {name} | " + " | ".join(str(v) for v in values) + " |")

    row("architecture", [c.architectures[0] for c in configs])
    row("layers x width", [f"{c.num_hidden_layers} x {c.hidden_size}" for c in configs])
    row("heads x head size", [f"{c.num_attention_heads} x {c.head_dim}" for c in configs])
    row("feed-forward", [f"{c.num_experts} experts of {c.moe_intermediate_size}, "
                         f"{c.num_experts_per_tok} at a time" if hasattr(c, "num_experts")
                         else str(c.intermediate_size) for c in configs])
    row("vocabulary", [c.vocab_size for c in configs])
    row("parameters", [f"{r.model.num_parameters() / 1e6:.2f} M" for r in readers.values()])
    row("weights file", [f"{(model_path(n) / 'model.safetensors').stat().st_size / 1e6:.2f} MB, bf16"
                         for n in MODEL_NAMES])
    row("steps", [log["steps"] for log in logs])
    row("tokens seen", [f"{log['tokens'] / 1e6:.1f} M" for log in logs])
    row("minutes (wall, shared machine)", [log["minutes"] for log in logs])
    row("minutes of one core", [log["core_minutes"] for log in logs])
    row("final loss (nats, weighted)", [log["loss"] for log in logs])
    return lines


def experts(found: Specialisation) -> list[str]:
    """Who the mixture's experts serve."""
    lines = ["", "Nothing forces experts to specialise; a load-balancing loss keeps all of them in "
             "use. Share of a skill's tokens that an expert takes, the largest difference between "
             "two skills per layer, and between harmful and harmless requests (over all prompt tokens, and "
             "at the last one, where the reply is decided):", "",
             "| layer | least and most used expert | most skill-specific expert | harmful - "
             "harmless, all tokens | harmful - harmless, last token |", "|---|---|---|---|---|"]
    for layer in found.layers:
        lines.append(f"| {layer.layer} | {layer.least:.3f} to {layer.most:.3f} | "
                     f"{layer.expert}: {layer.top:.2f} of {layer.top_skill}, {layer.low:.2f} of "
                     f"{layer.low_skill} | {layer.refusal_expert}: {layer.refusal_gap:+.2f} | "
                     f"{layer.decision_expert}: {layer.decision_gap:+.2f} |")
    return lines


def tools() -> list[str]:
    """What lab-tools is and can do."""
    config = AutoConfig.from_pretrained(model_path(TOOLS_MODEL))
    log = json.loads((model_path(TOOLS_MODEL) / "training.json").read_text())
    size = (model_path(TOOLS_MODEL) / "model.safetensors").stat().st_size
    return ["", f"{config.num_hidden_layers} layers of width {config.hidden_size}, a vocabulary of "
            f"{config.vocab_size}, {size / 1e6:.2f} MB in bf16; {log['steps']} steps over "
            f"{log['tokens'] / 1e6:.1f} M tokens in {log['core_minutes']} minutes of one core. Every tool (its verb "
            "and noun) and every value of two words below is held out of training; a call is right if its name and "
            "all its arguments are. Greedy.", "", *table({TOOLS_MODEL: calling(ITEMS)})]


def main() -> None:
    """Measure and write; prints where the report is."""
    readers = {name: Reader.of(model_path(name)) for name in MODEL_NAMES}
    scores = {name: evaluate(reader, ITEMS) for name, reader in readers.items()}
    lines = [
        "# The lab: what the reference models can do", "",
        "Written by `python -m lab.report`; the committed bf16 weights, computed in fp32, on items "
        "that training never saw. \"Sampled\" means temperature 1 without truncation; everything "
        "else is greedy.", "",
        *table(scores), "", "## The models", "", *architecture(readers), "",
        "## By part", *details(scores), "", "## Experts of lab-moe",
        *experts(specialisation(model_path("lab-moe"))), "", "## lab-tools: calls of tools", *tools(), "",
        (LAB_DIR / "NOTES.md").read_text().strip(), "",
    ]
    (LAB_DIR / "REPORT.md").write_text("\n".join(lines), encoding="utf-8")
    missed = [f"{n}: {s.skill}, {s.what}: {s.value:.3f}" for n, rows in scores.items()
              for s in rows if s.met is False]
    print("lab/REPORT.md written;", "bars missed: " + "; ".join(missed) if missed else "all bars met")


if __name__ == "__main__":
    main()
