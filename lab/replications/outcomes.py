"""What whole answers under a program are, by a grader: the claims of a row rest on these, not on first tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

from lab.datasets import load
from lab.replications.common import DRAWS, Finding, figures
from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.intervention import Intervention
from steering.programs.compiler import compile_program
from steering.programs.program import Program
from vectors.artifact import Metadata
from vectors.calibrate.placebo import random_like
from vectors.evaluate.graders import BROKEN, Answer, Grader, Tools, grade
from vectors.extract import Extraction
from vectors.extract.local import LocalSubject
from vectors.extract.standing import standing
from vectors.extract.subject import Tokens

MAX_TOKENS = 48


@dataclass(frozen=True)
class Asked:
    """Requests of one label and split, as text and as tokens, and what is usual for the untouched model's answers."""

    texts: tuple[str, ...]
    tokens: tuple[Tokens, ...]
    untouched: tuple[str, ...]
    usual_surprise: float


@lru_cache(maxsize=8)
def asked(model: LocalSubject, name: str, split: str, label: str, most: int = 64) -> Asked:
    texts = tuple(record["text"] for record in load(name, split) if record.get("label") == label)[:most]
    tokens = tuple(model.encode(text) for text in texts)
    written = model.write(tokens, MAX_TOKENS)
    surprise = surprise_of(model, tokens, [one.ids for one in written])
    return Asked(texts, tokens, tuple(one.text for one in written), median(surprise))


def answers(model: LocalSubject, requests: Asked, program: Program | None, grader: Grader,
            max_tokens: int = MAX_TOKENS) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Shares of the outcomes of greedy answers, and each answer with its outcome."""
    written = model.write(requests.tokens, max_tokens, program)
    surprise = surprise_of(model, requests.tokens, [one.ids for one in written])
    verdicts = grade(grader, [Answer(one.text, text, one.ended) for one, text in zip(written, requests.texts,
                                                                                   strict=True)],
                     Tools(surprise=lambda some: surprise, usual_surprise=requests.usual_surprise))
    found = [verdict.outcome for verdict in verdicts]
    shares = {name: round(found.count(name) / len(found), 4) for name in (*grader.outcomes, BROKEN)}
    return shares, [(one.text, outcome) for one, outcome in zip(written, found, strict=True)]


def surprise_of(model: LocalSubject, prompts: Sequence[Tokens], written: Sequence[Tokens]) -> list[float]:
    """Mean -log p of each answer's tokens under the untouched model, nats."""
    return [-value for value in model.continuation_logprobs(
        [(*prompt, *ids) for prompt, ids in zip(prompts, written, strict=True)], [len(prompt) for prompt in prompts])]


def stored_program(model: LocalSubject, metadata: Metadata, payload: Payload, **fields: Any) -> Program:
    """What `{"artifact": NAME}` does, or with other fields of an intervention (`op`, `layers`, `options`)."""
    source = Source(ref="tried", digest="", payload=payload, op=metadata.op, site=metadata.site,
                    layers=metadata.layers, strength=metadata.strength, options=metadata.options, scope=metadata.scope)
    override = [name for name in ("op",) if name in fields]
    wanted = Intervention.model_validate({"artifact": "tried", "override": override, **fields})
    return compile_program([Resolved(wanted, source)], model.facts)


def beside_random(model: LocalSubject, found: Extraction, requests: Asked, grader: Grader, **fields: Any
                  ) -> dict[str, Any]:
    """Outcomes under an artifact, with some answers, and under 20 random ones of the same size."""
    ours, said = answers(model, requests, stored_program(model, found.metadata, found.payload, **fields), grader)
    site = found.metadata.site
    assert site is not None
    drawn = [answers(model, requests, stored_program(
        model, found.metadata, random_like(found.payload, model.facts, site, seed), **fields), grader)[0]
        for seed in range(DRAWS)]
    return {"outcomes": ours, "random": {key: standing(ours[key], [other[key] for other in drawn]) for key in ours},
            "samples": [{"request": text, "answer": answer, "outcome": outcome}
                        for text, (answer, outcome) in list(zip(requests.texts, said, strict=True))[:6]]}


def in_words(outcomes: Mapping[str, float]) -> str:
    return (f"refused {outcomes['refusal']:.2f}, answered {outcomes['compliance']:.2f}, broken "
            f"{outcomes['broken']:.2f}")


def finding(measured: str, found: Mapping[str, Any], untouched: Mapping[str, float], wanted: str) -> Finding:
    """A line about whole answers. wanted: the outcome that the intervention is for, `compliance` or `refusal`."""
    done, before = ("answered", "refused") if wanted == "compliance" else ("refused", "answered")
    ours, random = found["outcomes"], found["random"]
    gained, broken = ours[wanted] - untouched[wanted], ours["broken"] - untouched["broken"]
    if gained <= 0:
        verdict = f"Nothing more is {done}" + (f", because what is no longer {before} is broken." if broken > 0.05
                                               else ".")
    else:
        beyond = ("more than with every random draw" if ours[wanted] > random[wanted]["max"]
                  else "which random draws reach as well")
        verdict = f"{gained:.2f} more are {done}, {beyond}; {max(broken, 0):.2f} more are broken."
    return Finding(measured, f"{in_words(ours)}; untouched {in_words(untouched)}",
                   f"{done} {figures(random[wanted], '.2f')}; broken {figures(random['broken'], '.2f')}", verdict)
