"""What a row is, the bundled models as subjects, and running recipes on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.datasets import load
from lab.paths import model_path
from steering.models.describe import model_facts
from steering.models.fingerprints import fingerprint
from steering.programs.program import Program
from vectors.extract import Extraction, parse_request, prepare
from vectors.extract.local import LocalSubject
from vectors.extract.refusals import FitFailed
from vectors.extract.subject import Tokens, answer_logprobs
from vectors.extract.work import Span, Work

Fields = dict[str, Any]
Document = dict[str, Any]
DRAWS = 20
# How the lab models begin a refusal, as the first token of an answer in a chat.
REFUSES = [" I", "I", " Sorry", "Sorry"]
NEUTRAL_TEXTS = 60


@dataclass(frozen=True)
class Case:
    """One run of a recipe; the artifact has the case's name."""

    name: str
    recipe: str
    fields: Fields


@dataclass(frozen=True)
class Finding:
    """One line of docs/replications.md. ours, control: the figures in words; verdict: what they say."""

    measured: str
    ours: str
    control: str
    verdict: str


@dataclass(frozen=True)
class Row:
    """One replication.

    measure: what the recipes' own reports do not hold, from their artifacts. findings, draw: from the document that
    is written as JSON. judged: what the figures are of, whole answers or less. bundled: artifacts of the model's
    library whose whole answers stand on their cards. notes: settings that were changed after a first look, and what
    was left out.
    """

    name: str
    title: str
    model: str
    claim: str
    cases: Callable[[LocalSubject], Iterator[Case]]
    measure: Callable[[LocalSubject, Mapping[str, Extraction]], Document]
    findings: Callable[[Document], list[Finding]]
    draw: Callable[[Document, Figure], None]
    judged: str
    bundled: tuple[str, ...] = ()
    notes: str = ""


def run_row(row: Row) -> Document:
    """Run the recipes, measure, and put it all into one document. That a recipe finds nothing is a result, too."""
    model = subject(row.model)
    found: dict[str, Extraction] = {}
    reports: Document = {}
    for case in row.cases(model):
        try:
            found[case.name] = extracted(model, case, f"python -m lab.replications {row.name}")
            reports[case.name] = dict(found[case.name].report)
        except FitFailed as error:
            reports[case.name] = {"failed": str(error)}
    return {"row": row.name, "claim": row.claim, "model": row.model, "fingerprint": model.facts.fingerprint,
            "cases": reports, "measured": row.measure(model, found)}


@lru_cache(maxsize=1)
def subject(name: str) -> LocalSubject:
    """A bundled model in float32 on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(model_path(name), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    return LocalSubject(model, tokenizer, model_facts(model, model_id=name, fingerprint=fingerprint(model)))


def extracted(model: LocalSubject, case: Case, created_by: str) -> Extraction:
    request = parse_request(case.recipe, {"name": case.name, **case.fields})
    return prepare(case.recipe, request, model, created_by).run(lambda share, stage: None, lambda: False)


def span(model: LocalSubject) -> Span:
    """For functions of the recipes that tell of their progress."""
    return Work(model, lambda share, stage: None, lambda: False, "lab.replications").within(0.0, 1.0, "capture")


def texts_of(model: LocalSubject, name: str, split: str, label: str | None = None) -> list[Tokens]:
    return [model.encode(record["text"]) for record in load(name, split) if label in (None, record.get("label"))]


def pairs_of(name: str) -> list[Fields]:
    return [{key: record[key] for key in ("positive", "negative", "item", "split")} for record in load(name)]


def nothing(model: LocalSubject, found: Mapping[str, Extraction]) -> Document:
    """For rows whose recipes measure everything."""
    return {}


def numbers(extraction: Extraction, layer: int) -> Mapping[str, torch.Tensor]:
    return extraction.payload.layers[layer]


def neutral_kl(model: LocalSubject, program: Program) -> float:
    """Mean KL, in nats, of the next token after neutral texts from that of the untouched model: what it costs."""
    texts, base = _neutral(model)
    changed = answer_logprobs(model, texts, lambda share: None, program)
    return float((base.exp() * (base - changed)).sum(dim=1).mean())


@lru_cache(maxsize=1)
def _neutral(model: LocalSubject) -> tuple[list[Tokens], torch.Tensor]:
    texts = texts_of(model, "neutral", "test")[:NEUTRAL_TEXTS]
    return texts, answer_logprobs(model, texts, lambda share: None)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def figures(standing: Mapping[str, Any], form: str = "+.2f") -> str:
    """A control's draws in words."""
    return (f"mean {standing['mean']:{form}}, range {standing['min']:{form}} to {standing['max']:{form}} "
            f"({standing['draws']} draws)")


def beats(standing: Mapping[str, Any]) -> str:
    """Where our figure stands among the draws, in words."""
    percentile = standing["percentile"]
    if percentile >= 100:
        return "above every draw"
    return f"at percentile {percentile:.0f} of the draws"
