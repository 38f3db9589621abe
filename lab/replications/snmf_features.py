"""Groups of MLP neurons by semi-nonnegative factorisation: how well they tell and steer concepts, beside the mean
difference at the same place and random groups, all at one KL (Shafran et al. 2025, arXiv 2506.10920)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from matplotlib.figure import Figure

from lab.datasets import load
from lab.replications.chart import OURS, SECOND, spread, tidy
from lab.replications.common import DRAWS, Case, Document, Fields, Finding, Row, figures, mean, texts_of
from steering.programs.program import Program
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.programs import EVERYWHERE, adding
from vectors.extract.standing import standing
from vectors.extract.subject import Tokens, answer_logprobs
from vectors.extract.telling import random_groups

CONCEPTS = ("french", "german", "spanish", "capital", "currency", "job", "pet")
MOST = {"train": 40, "dev": 15, "test": 20}
SITE, FEATURES, SHARE, LAYERS = "mlp_act", 40, 0.05, [1, 3]
DOSE, TOLERANCE, TRIES = 0.25, 0.01, 20
WORDS, PROMPTS = 20, 20


def examples() -> list[Fields]:
    """Sentences of three languages and of English, and facts of four relations with their answers."""
    records = [{**r, "text": r["text"] + r.get("answer", "")} for r in (*load("languages"), *load("relations"))
               if r["label"] in (*CONCEPTS, "english") and not r.get("held_out")]
    found, seen = [], Counter[tuple[str, str]]()
    for record in records:
        place = record["label"], record["split"]
        if seen[place] < MOST[record["split"]]:
            found.append({key: record[key] for key in ("text", "label", "item", "split")})
            seen[place] += 1
    return found


def cases(model: LocalSubject) -> Iterator[Case]:
    for concept in CONCEPTS:
        yield Case(f"group-{concept}", "snmf", {"examples": examples(), "target": concept, "layers": LAYERS,
                                                "features": FEATURES, "share": SHARE, "restarts": 2,
                                                "iterations": 120, "patience": 30})


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """What each vector adds to the log-odds of the concept's words after neutral texts, at the strength at which the
    next token's KL there is DOSE."""
    texts = texts_of(model, "neutral", "test")[:PROMPTS]
    base = answer_logprobs(model, texts, lambda share: None)
    generator = torch.Generator().manual_seed(1)
    document: Document = {}
    vectors = {concept: vector_of(found[f"group-{concept}"]) for concept in CONCEPTS if f"group-{concept}" in found}
    for n, (concept, (layer, vector)) in enumerate(vectors.items()):
        words = words_of(model, concept)

        def gain(direction: torch.Tensor, at: int = layer, words: Sequence[int] = words) -> float | None:
            return gain_at_dose(lambda scale: adding(model.facts, SITE, at, scale * direction, EVERYWHERE), model,
                                texts, base, words)

        kept = int((vector != 0).sum())
        drawn = [gain(random_groups(len(vector), 1, kept, generator)[:, 0]) for _ in range(DRAWS)]
        other, (at, theirs) = list(vectors.items())[(n + 1) % len(vectors)]
        own = gain(vector)
        reached = [value for value in drawn if value is not None]
        document[concept] = {
            "layer": layer, "words": len(words), "snmf": own,
            "mean_difference": gain(difference(model, concept, layer)),
            "other": other, "other_gain": gain(theirs, at=at), "random_reached": len(reached),
            "random": None if own is None or not reached else standing(own, reached)}
    return document


def vector_of(extraction: Extraction) -> tuple[int, torch.Tensor]:
    [(layer, tensors)] = extraction.payload.layers.items()
    return layer, tensors["vector"] / tensors["vector"].norm()


def difference(model: LocalSubject, concept: str, layer: int) -> torch.Tensor:
    """Unit difference of means over the tokens of train texts, the concept's less all others'."""
    sides: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for record in examples():
        if record["split"] == "train":
            [found] = model.capture([model.encode(record["text"])], SITE, [layer], None)
            sides[record["label"] == concept].append(found[layer][1:].mean(dim=0))
    vector = torch.stack(sides[True]).mean(dim=0) - torch.stack(sides[False]).mean(dim=0)
    return vector / vector.norm()


def words_of(model: LocalSubject, concept: str) -> list[int]:
    """The tokens that tell the concept's test texts from the other test texts, by their log-odds in them."""
    counts = {True: Counter[int](), False: Counter[int]()}
    for record in examples():
        if record["split"] == "test":
            counts[record["label"] == concept].update(model.encode(record["text"])[1:])
    sizes = {side: sum(found.values()) for side, found in counts.items()}
    odds = {token: math.log((count + 0.5) / sizes[True]) - math.log((counts[False][token] + 0.5) / sizes[False])
            for token, count in counts[True].items()}
    return sorted(odds, key=lambda token: (-odds[token], token))[:WORDS]


def gain_at_dose(program: Callable[[float], Program], model: LocalSubject, texts: Sequence[Tokens], base: torch.Tensor,
                 words: Sequence[int]) -> float | None:
    """Mean gain of log p(words) - log p(others); None where no strength gives the dose."""
    low, high = 0.0, math.inf
    scale = 1.0
    for _ in range(TRIES):
        changed = answer_logprobs(model, texts, lambda share: None, program(scale))
        kl = float((base.exp() * (base - changed)).sum(dim=1).mean())
        if abs(kl - DOSE) <= TOLERANCE:
            return float((log_odds(changed, words) - log_odds(base, words)).mean())
        low, high = (scale, high) if kl < DOSE else (low, scale)
        # KL grows about with the square of a small step.
        scale *= min(max(math.sqrt(DOSE / max(kl, 1e-9)), 0.25), 4.0)
        if not low < scale < high:
            scale = 2 * low if math.isinf(high) else (low + high) / 2
    return None


def log_odds(logprobs: torch.Tensor, words: Sequence[int]) -> torch.Tensor:
    inside = logprobs[:, list(words)].logsumexp(dim=1)
    return inside - (-inside.exp()).log1p()


def findings(document: Document) -> list[Finding]:
    reports = {concept: document["cases"][f"group-{concept}"] for concept in CONCEPTS}
    steered = {concept: one for concept, one in document["measured"].items() if one["random"] is not None}
    aucs = [report["test"]["auc"] for report in reports.values()]
    random = [report["controls"]["random_groups"] for report in reports.values()]
    dealt = [report["controls"]["dealt_neurons"] for report in reports.values()]
    tells = sum(report["test"]["auc"] > one["max"] for report, one in zip(reports.values(), random, strict=True))
    above = [concept for concept, one in steered.items() if one["random"]["percentile"] >= 95]
    both = {concept: one for concept, one in steered.items() if one["mean_difference"] is not None}
    better = [concept for concept, one in both.items() if one["snmf"] > one["mean_difference"]]
    short = [concept for concept in CONCEPTS if document["measured"][concept]["snmf"] is None]
    explained = [report["explained"] for report in reports.values()]
    control = [mean(report["explained_dealt"]) for report in reports.values()]
    stable = [report["groups"][0]["stability"] for report in reports.values()]
    return [
        Finding(f"AUC of the concept's group on held-out texts, mean of {len(aucs)} concepts", f"{mean(aucs):.3f}",
                f"the best of as many random groups {mean([one['mean'] for one in random]):.3f}; the best group of a "
                f"factorisation of dealt neurons {mean([one['mean'] for one in dealt]):.3f}",
                f"{tells} of {len(aucs)} above every draw of random groups. " + (
                    "Groups tell concepts better than random ones." if tells > len(aucs) / 2 else
                    "On this model any handful of neurons tells these concepts about as well.")),
        Finding(f"share of the squared activations that {FEATURES} groups explain", f"{mean(explained):.2f}",
                f"neurons dealt to other tokens: {mean(control):.2f}",
                "What is active together is no chance." if min(explained) > max(control) else
                "No more than by chance."),
        Finding("cosine of the concept's group with its nearest one of another beginning, mean", f"{mean(stable):.2f}",
                "-", "Most of the groups are found again." if mean(stable) > 0.8 else
                "Many groups depend on the beginning, so that a name for one should be checked on another."),
        Finding(f"gain of the log-odds of the concept's words after neutral texts at a KL of {DOSE}, mean of "
                f"{len(steered)} concepts", f"{mean([one['snmf'] for one in steered.values()]):+.2f}",
                f"random groups of as many neurons {mean([one['random']['mean'] for one in steered.values()]):+.2f}, "
                f"largest {max(one['random']['max'] for one in steered.values()):+.2f}; difference of means at the "
                f"same place, for the {len(both)} of them that it reaches the KL of, "
                f"{mean([one['mean_difference'] for one in both.values()]):+.2f}; another concept's group, where it "
                f"does, {mean([one['other_gain'] for one in steered.values() if one['other_gain'] is not None]):+.2f}",
                f"Above the 95th percentile of random groups for {len(above)} of {len(CONCEPTS)} "
                f"({', '.join(above) or 'none'}); better than the difference of means for {len(better)} of "
                f"{len(both)}. At no strength that was tried do the groups of {len(short)} "
                f"({', '.join(short) or 'none'}) move the next token that far. "
                + ("The claim holds here." if len(above) > len(CONCEPTS) / 2 and len(better) > len(both) / 2 else
                   "The claim does not hold on this model.")),
    ] + [Finding(f"the same, {concept} (layer {one['layer']})", f"{one['snmf']:+.2f}",
                 f"random groups {figures(one['random'])}; difference of means "
                 + ("does not reach the KL" if one["mean_difference"] is None else f"{one['mean_difference']:+.2f}"),
                 f"percentile {one['random']['percentile']:.0f} of random groups.") for concept, one in steered.items()]


def draw(document: Document, figure: Figure) -> None:
    axes = figure.subplots()
    steered = {concept: one for concept, one in document["measured"].items() if one["random"] is not None}
    at = list(range(len(steered)))
    spread(axes, at, [one["random"] for one in steered.values()], "random groups")
    axes.plot(at, [one["snmf"] for one in steered.values()], "o", color=OURS, label="the concept's group")
    axes.plot(at, [one["mean_difference"] or math.nan for one in steered.values()], "x", color=SECOND,
              label="difference of means")
    axes.set_xticks(at, list(steered))
    tidy(axes, title=f"gain of the concept's words at a KL of {DOSE}", y="nats")


ROW = Row(
    "snmf-features", "Groups of MLP neurons", "lab-dense",
    "Factors of MLP activations are groups of few neurons that tell concepts, and steer them better than a difference "
    "of means and features of sparse autoencoders do at one KL (arXiv 2506.10920).",
    cases, measure, findings, draw,
    judged="AUC is of texts that are read. Steering is of the next token after neutral texts: no text was written, so "
           "nothing is claimed of what groups make the model write.",
    notes="The paper has a language model judge sampled continuations; here the readout is the log-odds of twenty "
          "words of held-out texts of the concept. These are rare after neutral texts, so that any damage raises them, "
          "as random groups show. The paper's groups hold one neuron in a hundred, of thousands; here they hold one in "
          "twenty of 384. Features of an SAE were not put beside them. All arms act on the same layer's MLP "
          "activations, at every token. Two layers and two beginnings of 120 iterations were tried for each concept.")
