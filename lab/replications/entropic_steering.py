"""Entropic steering of a bandit player, beside random vectors and sampling at a higher temperature (Rahn et al. 2024,
arXiv 2406.00244)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from matplotlib.figure import Figure

from lab.datasets import load
from lab.replications.chart import CONTROL, OURS, SECOND, spread, tidy
from lab.replications.common import NEUTRAL_TEXTS, Case, Document, Finding, Row, beats, figures, numbers, texts_of
from steering.programs.program import Program
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.programs import adding
from vectors.extract.subject import answer_logprobs

ACTIONS = (" A", " B")
HOTTEST = 64.0


def cases(model: LocalSubject) -> Iterator[Case]:
    yield Case("explore", "entropic_steering", {
        "prompts": [{"text": r["text"], "episode": r["item"], "step": r["step"], "split": r["split"]}
                    for r in load("bandit")], "actions": list(ACTIONS), "center": "step", "max_eval": 60})


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """The vector beside a temperature that gives the choices the same mean entropy: how far each is from the player's
    true policy, what is left for the actions, and what it does to text that is no choice."""
    extraction = found["explore"]
    report = extraction.report
    layer, strength = report["best_layer"], report["best_strength"]
    program = adding(model.facts, "resid_post", layer, strength * numbers(extraction, layer)["vector"].double())
    records = [r for r in load("bandit", "test")]
    texts = [model.encode(r["text"]) for r in records]
    policy = torch.tensor([r["p_arm_a"] for r in records], dtype=torch.float64)
    actions = [model.encode_continuation(action)[0] for action in ACTIONS]
    neutral = texts_of(model, "neutral", "test")[:NEUTRAL_TEXTS]
    base = _all(model, texts, None)
    calm, quiet = _all(model, neutral, None), _all(model, neutral, program)
    steered = _all(model, texts, program)
    wanted = _choice(steered, actions, policy)["entropy"]
    temperature = _temperature(base, actions, policy, wanted)
    hot, calm_hot = ((one / temperature).log_softmax(dim=1) for one in (base, calm))
    return {"strength": strength, "layer": layer, "temperature": round(temperature, 3),
            "untouched": _choice(base, actions, policy),
            "steered": {**_choice(steered, actions, policy), "neutral_kl": _kl(calm, quiet),
                        "neutral_entropy": _entropy(quiet) - _entropy(calm)},
            "tempered": {**_choice(hot, actions, policy), "neutral_kl": _kl(calm, calm_hot),
                         "neutral_entropy": _entropy(calm_hot) - _entropy(calm)}}


def _all(model: LocalSubject, texts: list[tuple[int, ...]], program: Program | None) -> torch.Tensor:
    return answer_logprobs(model, texts, lambda share: None, program)


def _choice(logprobs: torch.Tensor, actions: list[int], policy: torch.Tensor) -> dict[str, float]:
    among = logprobs[:, actions].log_softmax(dim=1)
    p_a = among[:, 0].exp()
    decided = (policy - 0.5).abs() > 0.1
    return {"entropy": float(-(among.exp() * among).sum(dim=1).mean()),
            "mass": float(logprobs[:, actions].exp().sum(dim=1).mean()),
            "distance_from_policy": float((p_a - policy).abs().mean()),
            "better_arm": float(torch.where(policy > 0.5, p_a, 1 - p_a)[decided].mean())}


def _temperature(base: torch.Tensor, actions: list[int], policy: torch.Tensor, wanted: float) -> float:
    low, high = 1.0, HOTTEST
    for _ in range(40):
        middle = (low + high) / 2
        if _choice((base / middle).log_softmax(dim=1), actions, policy)["entropy"] < wanted:
            low = middle
        else:
            high = middle
    return low


def _entropy(logprobs: torch.Tensor) -> float:
    return float(-(logprobs.exp() * logprobs).sum(dim=1).mean())


def _kl(base: torch.Tensor, changed: torch.Tensor) -> float:
    return float((base.exp() * (base - changed)).sum(dim=1).mean())


def findings(document: Document) -> list[Finding]:
    report, measured = document["cases"]["explore"], document["measured"]
    by = report["test"]["entropy_by_strength"]
    order = sorted(by, key=float)
    entropies = [by[strength]["entropy"] for strength in order]
    rising = all(a <= b for a, b in zip(entropies, entropies[1:], strict=False))
    gain, shuffled = (report["controls"]["entropy_gain"][key] for key in ("random_vectors", "permuted_entropies"))
    ours, hot, plain = measured["steered"], measured["tempered"], measured["untouched"]
    return [
        Finding("action entropy (nats) at strengths " + ", ".join(order), ", ".join(f"{e:.2f}" for e in entropies),
                f"mass on the actions {min(by[s]['mass'] for s in order):.3f} to "
                f"{max(by[s]['mass'] for s in order):.3f}",
                "Rises with strength in both signs." if rising else "Does not rise steadily with strength."),
        Finding(f"gain of action entropy at the strength chosen on dev ({report['best_strength']})",
                f"{gain['found']:+.3f}",
                f"random vectors {figures(gain, '+.3f')}; permuted entropies {figures(shuffled, '+.3f')}",
                f"{beats(gain).capitalize()} of random vectors, {beats(shuffled)} of permuted entropies."),
        Finding(f"at equal action entropy ({ours['entropy']:.2f}): probability left for naming an action; of the "
                "better arm", f"{ours['mass']:.3f}; {ours['better_arm']:.3f}",
                f"temperature {measured['temperature']}: {hot['mass']:.3f}; {hot['better_arm']:.3f} (untouched "
                f"{plain['mass']:.3f}; {plain['better_arm']:.3f})",
                "The vector keeps the actions; temperature loses some." if ours["mass"] > hot["mass"] + 0.01
                else "Both keep the actions."),
        Finding("at equal action entropy: KL and entropy change on neutral text",
                f"{ours['neutral_kl']:.2f} nats; {ours['neutral_entropy']:+.2f}",
                f"temperature {measured['temperature']}: {hot['neutral_kl']:.2f} nats; {hot['neutral_entropy']:+.2f}",
                "The vector disturbs other text less than temperature does."
                if ours["neutral_kl"] < hot["neutral_kl"] else "The vector disturbs other text more than temperature "
                "does: it is no cleaner way to the same entropy."),
    ]


def draw(document: Document, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    report, measured = document["cases"]["explore"], document["measured"]
    by = report["test"]["entropy_by_strength"]
    order = sorted(by, key=float)
    left.plot([float(s) for s in order], [by[s]["entropy"] for s in order], "o-", color=OURS, label="steered")
    start = by["0.0"]["entropy"]
    gain = report["controls"]["entropy_gain"]["random_vectors"]
    spread(left, [report["best_strength"]], [{key: gain[key] + start for key in ("min", "max", "mean")}],
           "random vectors")
    left.axhline(start, color=CONTROL, linewidth=0.8)
    tidy(left, title="action entropy on test (nats)", x="strength (share of the residual norm)")
    names = ("mass", "better_arm", "distance_from_policy", "neutral_kl")
    for n, (key, colour) in enumerate((("steered", OURS), ("tempered", SECOND))):
        right.bar([i + 0.4 * n - 0.2 for i in range(len(names))], [measured[key][name] for name in names], 0.4,
                  color=colour, label="vector" if key == "steered" else f"temperature {measured['temperature']}")
    right.set_xticks(range(len(names)), ["mass on\nactions", "p(better\narm)", "distance\nfrom policy",
                                         "KL on\nneutral text"])
    tidy(right, title="at equal action entropy")


ROW = Row(
    "entropic-steering", "Entropic steering", "lab-dense",
    "A vector of entropy-weighted activations makes an agent's choice of action less certain, which random vectors do "
    "not and a higher sampling temperature cannot (arXiv 2406.00244).",
    cases, measure, findings, draw,
    judged="Everything here is of the next token, because the claim is about the distribution that an action is "
           "drawn from. What the model writes after it was not judged, so nothing is claimed of it.",
    notes="Actions are read from the exact next-token probabilities, not sampled, so the comparison with temperature "
          "is of distributions.")
