"""Is what interventions do together foretold by what each does alone?

Random stacks of 2 to 4 interventions, of bundled directions and of random ones, added and taken out, are checked on one
half of the prompts. What is foretold of each is set beside what the stack does on the other half.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure

from lab.datasets import load
from lab.paths import LAB_DIR
from lab.replications.chart import tidy
from lab.replications.common import Case, Document, Finding, Row, pairs_of
from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import TrimtabError
from steering.language.intervention import Intervention
from steering.language.strength import Strength
from steering.programs.compiler import compile_program
from steering.programs.program import Program
from vectors.artifact import Limits
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.formats import get_format
from vectors.stacks.report import Part, StackCheck
from vectors.stacks.run import Text, check, divergence, only

CASE = "tone"
STACKS, PROMPTS, TOKENS, BOOTSTRAPS, SHUFFLES = 80, 8, 8, 1000, 1000
BUNDLED = ("cheerful", "french", "german", "past-tense", "plural", "to-french", "refusal")
# Times the strength of their own.
DOSES = (0.4, 0.7, 1.0, 1.4)
# By name, what is foretold from a check and what is only there to compare with.
PREDICTIONS = {
    "check": "the check: each alone, and pairs that meet run together",
    "alone": "changes of log-probabilities of each alone, summed",
    "second order": "the same to second order: covariances in the Fisher metric",
    "overlap": "correlation of coordinates where two meet, times their sizes",
    "sizes": "sizes alone: all pairs taken to be equally alike",
}


def cases(model: LocalSubject) -> Iterator[Case]:
    """One more direction, made here."""
    yield Case(CASE, "mean_difference", {"pairs": pairs_of("sentiment"), "trial": {"effort": "none"}})


def measure(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    generator = random.Random(0)
    sources = bundled(found)
    texts = {split: prompts(model, split) for split in ("train", "test")}
    stacks = []
    while len(stacks) < STACKS:
        drawn = [drawn_part(sources, model, generator) for _ in range(generator.choice((2, 3, 4)))]
        try:
            program = compile_program(drawn, model.facts)
        except TrimtabError:
            continue
        stacks.append(one_stack(program, texts, model))
    return {"stacks": stacks, "predictions": {name: judged(stacks, name) for name in PREDICTIONS},
            "again": correlation([one["here"] for one in stacks], [one["measured"] for one in stacks]),
            "by_kind": by_kind(stacks)}


def prompts(model: LocalSubject, split: str) -> list[Text]:
    """Beginnings of neutral texts of one split."""
    beginnings = list(dict.fromkeys(model.encode(record["text"])[:10] for record in load("neutral", split)))
    return [Text(beginnings[n * len(beginnings) // PROMPTS]) for n in range(PROMPTS)]


def bundled(found: Mapping[str, Extraction]) -> list[Source]:
    sources = []
    for name in BUNDLED:
        data = (LAB_DIR / "artifacts" / "lab-dense" / f"{name}.safetensors").read_bytes()
        metadata, payload = get_format("safetensors").read(data, {}, Limits())
        if payload.kind == "vector":
            sources.append((name, metadata, payload))
    sources += [(name, one.metadata, one.payload) for name, one in found.items()]
    return [Source(ref=name, digest="", payload=payload, op="add", site=metadata.site, layers=metadata.layers,
                   strength=metadata.strength, residual_norm=metadata.residual_norm)
            for name, metadata, payload in sources if metadata.site == "resid_post"]


def drawn_part(sources: Sequence[Source], model: LocalSubject, generator: random.Random) -> Resolved:
    """A bundled direction at its own layers or at others, or a random one as long; added, or taken out."""
    source = generator.choice(sources)
    own = [layer for layer in source.payload.layers if source.layers in (None, "all") or layer in source.layers]
    layer = generator.choice(own)
    vector, at = source.payload.layers[layer]["vector"], layer
    if generator.random() < 0.4:
        drawn = torch.randn(len(vector), generator=torch.Generator().manual_seed(generator.getrandbits(32)))
        vector, at = drawn * vector.norm() / drawn.norm(), generator.randrange(model.facts.num_layers)
        source = replace(source, ref="random")
    elif generator.random() < 0.4:
        at = generator.randrange(model.facts.num_layers)
    source = replace(source, payload=Payload.build("vector", {at: {"vector": vector}}), layers=[at],
                     residual_norm={at: source.residual_norm[layer]} if layer in source.residual_norm else {})
    if generator.random() < 0.25:
        return Resolved(Intervention(artifact=source.ref, op="ablate", override=["op"], strength=Strength(value=1.0)),
                        source)
    return Resolved(Intervention(artifact=source.ref), source,
                    factor=generator.choice(DOSES) * generator.choice((1, 1, 1, -1)))


def one_stack(program: Program, texts: Mapping[str, Sequence[Text]], model: LocalSubject) -> dict[str, Any]:
    parts = [Part(op=one.op, artifact=one.applied.artifact, sites=list(one.applied.sites),
                  layers=list(one.applied.layers), kl=0.0) for one in program.compiled]
    told = check(program, parts, texts["train"], TOKENS, model)
    alone = check(program, parts, texts["train"], TOKENS, model, most_pairs=0) if any(
        pair.measured for pair in told.pairs) else told
    return {"parts": [f"{part.op} {part.artifact} {part.layers}" for part in told.interventions],
            "measured": held_out(program, texts["test"], model), "here": told.measured_interference,
            "check": told.interference, "alone": alone.interference, "met": sum(pair.measured for pair in told.pairs),
            "second order": weighted(told, [pair.correlation for pair in told.pairs]),
            "overlap": weighted(told, [max((one.overlap for one in pair.meetings), default=0.0)
                                       for pair in told.pairs]),
            "sizes": weighted(told, [1.0] * len(told.pairs)), "advice": [one.text for one in told.advice]}


def weighted(told: StackCheck, alike: Sequence[float]) -> float:
    """Twice the root of the product of two KLs is the covariance of two changes that are as alike as 1."""
    kl = [part.kl for part in told.interventions]
    return sum(2 * like * (kl[pair.first] * kl[pair.second]) ** 0.5
               for pair, like in zip(told.pairs, alike, strict=True))


def held_out(program: Program, texts: Sequence[Text], model: LocalSubject) -> float:
    """KL(steered || untouched) of the stack beyond the sum of its members, on texts by the untouched model."""
    arms = [only(program, [n]) for n in range(len(program.compiled))]
    total = torch.zeros(1 + len(arms), dtype=torch.float64)
    tokens = 0
    for text, said in zip(texts, model.write([one.prompt for one in texts], TOKENS), strict=True):
        if said.ids:
            ids, start = (*text.prompt, *said.ids), len(text.prompt)
            base = model.continuation_rows(ids, start)
            total += torch.tensor([float(divergence(model.continuation_rows(ids, start, one), base).sum())
                                   for one in (program, *arms)])
            tokens += len(said.ids)
    return float((total[0] - total[1:].sum()) / tokens)


def ranks(values: Sequence[float]) -> torch.Tensor:
    """Ties have their mean rank."""
    given = torch.tensor(values, dtype=torch.float64)
    _, inverse, counts = given.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    a, b = (ranks(values) - ranks(values).mean() for values in (one, other))
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0


def correlation(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Rank correlation with the middle 95 % of those of stacks drawn anew."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(BOOTSTRAPS):
        chosen = torch.randint(len(one), (len(one),), generator=generator).tolist()
        drawn.append(spearman([one[n] for n in chosen], [other[n] for n in chosen]))
    low, high = torch.tensor(drawn).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"rho": spearman(one, other), "low": low, "high": high}


def judged(stacks: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    predicted, measured = [one[name] for one in stacks], [one["measured"] for one in stacks]
    generator = torch.Generator().manual_seed(1)
    shuffled = [spearman([predicted[n] for n in torch.randperm(len(predicted), generator=generator).tolist()], measured)
                for _ in range(SHUFFLES)]
    error = sum(abs(p - m) for p, m in zip(predicted, measured, strict=True)) / len(measured)
    return {**correlation(predicted, measured), "error": error,
            "shuffled_95": float(torch.tensor(shuffled).abs().quantile(0.95))}


def by_kind(stacks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the check, for stacks of which no pair met and a prediction is of parts alone, and for the others."""
    found = {}
    for kind, wanted in (("none met", False), ("some met", True)):
        some = [one for one in stacks if bool(one["met"]) == wanted]
        if len(some) > 3:
            found[kind] = {"stacks": len(some), **correlation([one["check"] for one in some],
                                                              [one["measured"] for one in some])}
    size = sum(abs(one["measured"]) for one in stacks) / len(stacks)
    return {**found, "mean_size": size, "below_zero": sum(one["measured"] < 0 for one in stacks)}


def findings(document: Document) -> list[Finding]:
    measured = document["measured"]
    kinds, count = measured["by_kind"], len(measured["stacks"])
    found = []
    plain = measured["predictions"]["sizes"]
    for name, figures in measured["predictions"].items():
        if name == "sizes":
            continue
        verdict = ("It ranks stacks better than their sizes do." if figures["low"] > plain["rho"] else
                   "It ranks stacks no better than their sizes do." if figures["rho"] <= plain["rho"] else
                   "It ranks stacks better than their sizes do, within the interval.")
        found.append(Finding(
            f"rank correlation over {count} stacks of KL beyond the sum of the parts, on prompts held out, with "
            f"{PREDICTIONS[name]}",
            f"{in_words(figures)}; mean error {figures['error']:.3f} of {kinds['mean_size']:.3f} nats",
            f"shuffled |rho| {figures['shuffled_95']:.2f} at 95 %; {PREDICTIONS['sizes']} {in_words(plain)}",
            verdict))
    found.append(Finding("the same with the stack itself, run on the prompts of the check", in_words(measured["again"]),
                         "-", "So much can be known from other prompts at all."))
    found += [Finding(f"the check, {figures['stacks']} stacks of which {kind}", in_words(figures), "-",
                      "A prediction from parts alone." if kind == "none met" else
                      "Pairs that act on what the other left were run together.")
              for kind, figures in kinds.items() if isinstance(figures, dict)]
    return found


def in_words(figures: Mapping[str, float]) -> str:
    return f"{figures['rho']:.2f} ({figures['low']:.2f} to {figures['high']:.2f})"


def draw(document: Document, figure: Figure) -> None:
    axes = figure.subplots(1, 2)
    stacks = document["measured"]["stacks"]
    for one, name in zip(axes, ("check", "overlap"), strict=True):
        one.scatter([stack[name] for stack in stacks], [stack["measured"] for stack in stacks], s=12)
        one.set_xscale("symlog", linthresh=0.01)
        one.set_yscale("symlog", linthresh=0.01)
        tidy(one, title=f"rho {document['measured']['predictions'][name]['rho']:.2f}", x=f"foretold: {name}, nats",
             y="measured on other prompts, nats")


ROW = Row(
    "stacks", "What interventions do together", "lab-dense",
    "For small changes KL is a quadratic form, whose metric is the Fisher information of the output; so what a stack "
    "does beyond the sum of its parts are the products of their changes in that metric.",
    cases, measure, findings, draw,
    judged="KL of next tokens of texts that the untouched model wrote. This is no claim about what texts become.",
    notes="Directions are added at 0.4 to 1.4 times their bundled strength, one in four with its sign turned, or taken "
    "out. Overlap is of coordinates along two directions where one acts on what the other left, else 0.")
