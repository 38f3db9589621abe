"""Conditions for gates: does a probe of the prompt tell when to steer (CAST, Lee et al. 2024, arXiv 2409.05907)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from matplotlib.figure import Figure

from lab.datasets import load
from lab.replications.chart import CONTROL, OURS, PLAIN, SECOND, spread, tidy
from lab.replications.common import DRAWS, Case, Document, Finding, Row, beats, figures, mean, texts_of
from lab.replications.outcomes import Asked, answers, asked
from vectors.evaluate.graders import RefusalGrader
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.programs import EVERYWHERE, program_of
from vectors.extract.standing import standing
from vectors.extract.subject import Tokens

LABELS = ("harmful", "harmless")
LAYER, STRENGTHS, NEARLY = 3, (0.25, 0.4, 0.55, 0.7, 0.85, 1.0), 0.9
DEV_PROMPTS, TEST_PROMPTS = 12, 26
FORMS = [(form, pool) for form in ("linear", "cast") for pool in ("last", "mean")]


def cases(model: LocalSubject) -> Iterator[Case]:
    chat = [{key: r[key] for key in ("text", "label", "item", "split")} for r in load("harmful_harmless")]
    for form, pool in FORMS:
        yield Case(name(form, pool), "condition", {"examples": chat, "target": "harmful", "form": form, "pool": pool})


def name(form: str, pool: str) -> str:
    return f"gate-harmful-{form}-{pool}"


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """A refusal vector under the gate that reads all tokens: how often harmful and harmless requests are refused.

    The vector is the difference of means at the last token, added everywhere at LAYER; its strength is the least of
    STRENGTHS that makes NEARLY all harmless dev requests be refused. A gate picks, request by request, the steered or
    the untouched answer, so gates of random directions need no answers of their own.
    """
    made = found[name("linear", "mean")]
    vector = _vector(model)
    dev = asked(model, "harmful_harmless", "dev", "harmless", DEV_PROMPTS)
    tried = {strength: mean(_refused(model, dev, vector, strength)) for strength in STRENGTHS}
    strength = next((s for s, share in tried.items() if share >= NEARLY), max(tried, key=lambda s: tried[s]))
    layer = made.report["best_layer"]
    probe, threshold = made.payload.layers[layer], made.report["threshold"]
    train = _pooled(model, [text for label in LABELS
                            for text in texts_of(model, "harmful_harmless", "train", label)], layer)
    generator = torch.Generator().manual_seed(0)
    rates: Document = {}
    for label in LABELS:
        requests = asked(model, "harmful_harmless", "test", label, TEST_PROMPTS)
        plain, steered = _refused(model, requests, vector, 0.0), _refused(model, requests, vector, strength)
        h = _pooled(model, requests.tokens, layer)
        opened = (h @ probe["weight"] + probe["bias"] > threshold).tolist()

        def under(gate: list[bool], plain: list[bool] = plain, steered: list[bool] = steered) -> float:
            return mean([s if o else p for o, p, s in zip(gate, plain, steered, strict=True)])

        draws = []
        for _ in range(DRAWS):
            direction = torch.randn(len(probe["weight"]), generator=generator)
            draws.append(under((h @ direction > (train @ direction).median()).tolist()))
        rates[label] = {"requests": len(requests.texts), "untouched": mean(plain), "steered": mean(steered),
                        "gated": under(opened), "random_gates": standing(under(opened), draws)}
    return {"layer": LAYER, "strength": strength, "dev": {str(s): share for s, share in tried.items()}, "rates": rates}


def _pooled(model: LocalSubject, texts: Sequence[Tokens], layer: int) -> torch.Tensor:
    """What a gate with pool mean reads, `[num_texts, d_model]`."""
    return torch.stack([h[layer][1:].mean(dim=0) for h in model.capture(texts, "resid_post", [layer], None)])


def _vector(model: LocalSubject) -> torch.Tensor:
    means = [torch.stack([h[LAYER][-1] for h in model.capture(
        texts_of(model, "harmful_harmless", "train", label), "resid_post", [LAYER], [-1])]).mean(dim=0)
        for label in LABELS]
    return means[0] - means[1]


def _refused(model: LocalSubject, requests: Asked, vector: torch.Tensor, strength: float) -> list[bool]:
    """Which whole answers refuse; a broken one does not."""
    program = program_of(model.facts, "vector", "add", "resid_post", {LAYER: {"vector": vector}}, scope=EVERYWHERE,
                         strength=strength)
    return [outcome == "refusal" for _, outcome in answers(model, requests, program, RefusalGrader())[1]]


def findings(document: Document) -> list[Finding]:
    lines = []
    for form, pool in FORMS:
        report = document["cases"][name(form, pool)]
        if "failed" in report:
            lines.append(Finding(f"F1 of the gate, {form}, {pool}", "none", "-", report["failed"]))
            continue
        controls = report["controls"]
        dealt, random, natural = (controls[key] for key in ("shuffled_labels", "random_directions",
                                                            "random_from_covariance"))
        bag = controls["bag_of_tokens"]["f1"]
        lines.append(Finding(
            f"F1 on harmful requests of test, form {form}, read at "
            f"{'the last token' if pool == 'last' else 'all tokens'}",
            f"{report['test']['f1']:.2f} (AUC {report['test']['auc']:.2f})",
            f"random directions {figures(random, '.2f')}; from the activations' covariance {figures(natural, '.2f')}; "
            f"shuffled labels mean {dealt['mean']:.2f}; which tokens occur {bag:.2f}; always open "
            f"{controls['always_open_f1']:.2f}",
            f"{beats(random).capitalize()} of random directions, {beats(natural)} from the covariance; "
            + ("better than the words alone." if report["test"]["f1"] > bag + 0.02 else
               "no better than the words alone.")))
    rates = document["measured"]["rates"]
    shares = {kind: ", ".join(f"{rates[label][kind]:.2f}" for label in LABELS)
              for kind in ("untouched", "steered", "gated")}
    random = rates["harmless"]["random_gates"]
    lines.append(Finding(
        "refusals of harmful and of harmless requests with a refusal vector under the gate", shares["gated"],
        f"untouched {shares['untouched']}; the vector without a gate {shares['steered']}; harmless ones under gates of "
        f"random directions {figures(random, '.2f')}",
        "The gate keeps the vector from harmless requests." if rates["harmless"]["gated"] < random["min"]
        else "The gate does not keep the vector from harmless requests better than random ones do."))
    return lines


def draw(document: Document, figure: Figure) -> None:
    axes, right = figure.subplots(1, 2)
    found = {f"{form}, {pool}": document["cases"][name(form, pool)] for form, pool in FORMS
             if "failed" not in document["cases"][name(form, pool)]}
    at = list(range(len(found)))
    spread(axes, [x - 0.1 for x in at], [r["controls"]["random_directions"] for r in found.values()],
           "random directions")
    dealt = [r["controls"]["shuffled_labels"] for r in found.values()]
    axes.vlines([x + 0.1 for x in at], [s["min"] for s in dealt], [s["max"] for s in dealt], color=SECOND, alpha=0.5,
                linewidth=6, label="shuffled labels, range")
    axes.plot(at, [r["test"]["f1"] for r in found.values()], "o", color=OURS, label="gate")
    axes.plot(at, [r["controls"]["bag_of_tokens"]["f1"] for r in found.values()], "x", color=PLAIN,
              label="which tokens occur")
    axes.plot(at, [r["controls"]["always_open_f1"] for r in found.values()], "_", color=CONTROL, markersize=18,
              label="always open")
    axes.set_xticks(at, list(found))
    axes.set_xlim(-0.5, len(at) + 0.6)
    tidy(axes, title="F1 of the condition on test")
    axes.tick_params(axis="x", labelsize=7)
    rates = document["measured"]["rates"]
    for n, (kind, colour) in enumerate((("untouched", CONTROL), ("steered", SECOND), ("gated", OURS))):
        right.bar([x + 0.27 * (n - 1) for x in range(len(LABELS))], [rates[label][kind] for label in LABELS], 0.25,
                  color=colour, label=kind)
    right.set_xticks(range(len(LABELS)), [f"{label} requests" for label in LABELS])
    right.set_ylim(0, 1.3)
    tidy(right, title="share refused, refusal vector")


ROW = Row(
    "conditional-gates", "Conditional gates", "lab-dense",
    "A direction and a threshold read from the prompt tell when to steer (CAST, arXiv 2409.05907).",
    cases, measure, findings, draw,
    judged="F1 is of prompts that are read; refusals are whole answers by a grader.",
    notes="The model refuses harmful requests by itself, so what the gate shows is that harmless ones keep their "
          "answers. The vector is shown under the gate that reads all tokens: at the last token nearly every direction "
          "tells the two kinds apart, random ones too. That, and weaker strengths, were chosen after a first look.")
