"""What bundled artifacts whose recipes go by first tokens do to whole answers, beside random ones of equal size: greedy
answers of a few tokens to test prompts, right where they name the right word first.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lab.corpus import calendar
from lab.datasets import load
from lab.replications.common import DRAWS
from lab.replications.function_vectors import TEMPLATE, word_pairs
from lab.replications.outcomes import stored_program
from steering.artifacts.payload import Payload
from steering.language.vocabulary import Site
from steering.programs.program import Program
from vectors.artifact import Metadata
from vectors.calibrate.placebo import random_like
from vectors.evaluate.graders import Answer, grade
from vectors.evaluate.graders.choice import ChoiceGrader
from vectors.extract.local import LocalSubject
from vectors.extract.standing import standing

MAX_TOKENS = 6
SHOWN = 6
MOST = 80
Question = tuple[str, str]


@dataclass(frozen=True)
class Asked:
    """questions: prompts with their right answers. options: what an answer may name first, where the wrong ones are
    known. measured: what a right answer is, in words. wanted: which way their share should go. others: questions whose
    answers should stay right, and what they are."""

    measured: str
    questions: Sequence[Question]
    options: Sequence[str] = ()
    wanted: Literal["more", "fewer"] = "more"
    others: Sequence[Question] = ()
    elsewhere: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


def task(name: str, what: str) -> Asked:
    pairs = [(TEMPLATE.replace("{x}", pair["input"]), pair["output"].strip()) for pair in word_pairs(name)
             if pair["split"] == "test"]
    return Asked(f"right answers to 'WORD ->' ({what})", pairs, [answer for _, answer in pairs])


def shown() -> Asked:
    """Five examples, then a query."""
    found = [(one["text"], one["answer"].strip()) for one in load("task_prompts", "test") if one["shots"] == 5]
    return Asked("right answers after five examples", found[:MOST], [answer for _, answer in found], "fewer")


def jobs() -> Asked:
    known = [one for one in load("relations", "test") if not one["held_out"]]
    ours, others = ([(one["text"], one["answer"].strip()) for one in known if (one["label"] == "job") == here]
                    for here in (True, False))
    return Asked("right answers to 'NAME works as'", ours[:MOST], wanted="fewer", others=others[:MOST],
                 elsewhere="right answers of other relations")


def weekday(target: str) -> Asked:
    questions = [(one["text"], target) for one in load("calendar", "test")
                 if one["series"] == "weekdays" and one["answer"].strip() != target]
    return Asked(f"answers '{target}' to questions whose answer is another day", questions[:MOST], calendar.WEEKDAYS)


def measured(model: LocalSubject, metadata: Metadata, payload: Payload, asked: Asked) -> dict[str, Any]:
    """Shares of right answers untouched, under the artifact and under random ones, with some texts of the three."""
    assert metadata.site is not None
    grader = ChoiceGrader(match="first", options=list(dict.fromkeys(asked.options)))
    programs = [None, stored_program(model, metadata, payload, **asked.fields),
                *(stored_program(model, metadata, _random(model, payload, metadata.site, seed), **asked.fields)
                  for seed in range(DRAWS))]
    plain, ours, *drawn = [_right(model, asked.questions, program, grader) for program in programs]
    shares = [_share(one) for one in drawn]
    found = {"measured": asked.measured, "wanted": asked.wanted, "prompts": len(asked.questions),
             "max_tokens": MAX_TOKENS, "untouched": _share(plain), "steered": _share(ours),
             "random": standing(_share(ours), shares),
             "samples": [{"prompt": prompt, "expected": right,
                          "texts": [one[n][0] for one in (plain, ours, drawn[0])],
                          "outcomes": [one[n][1] for one in (plain, ours, drawn[0])]}
                         for n, (prompt, right) in enumerate(asked.questions[:SHOWN])]}
    if asked.others:
        bare = ChoiceGrader(match="first")
        found |= {"elsewhere": asked.elsewhere, "others": {
            name: _share(_right(model, asked.others, program, bare))
            for name, program in zip(("untouched", "steered"), programs, strict=False)}}
    return found


def verdict(found: Mapping[str, Any]) -> str:
    """In plain words."""
    sign = 1 if found["wanted"] == "more" else -1
    gained = sign * (found["steered"] - found["untouched"])
    best = found["random"]["max" if sign > 0 else "min"]
    if gained <= 0:
        return "Nothing is gained."
    if sign * (found["steered"] - best) <= 0:
        return "A random artifact of equal size does as much."
    said = f"{100 * gained:.0f} points, {100 * sign * (found['steered'] - best):.0f} beyond every random one."
    if "others" in found:
        others = found["others"]
        said += f" {found['elsewhere'].capitalize()}: {others['steered']:.0%}, untouched {others['untouched']:.0%}."
    return said


def _random(model: LocalSubject, payload: Payload, site: Site, seed: int) -> Payload:
    """An artifact of equal size. Of heads as many of all the others, because a layer has four, and three drawn of them
    are often the set itself."""
    if payload.kind != "head_set":
        return random_like(payload, model.facts, site, seed)
    own = {(layer, int(head)) for layer, numbers in payload.layers.items() for head in numbers["heads"]}
    others = [(layer, head) for layer in range(model.facts.num_layers) for head in range(model.facts.num_heads)
              if (layer, head) not in own]
    drawn: dict[int, list[int]] = {}
    for layer, head in random.Random(seed).sample(others, len(own)):
        drawn.setdefault(layer, []).append(head)
    return Payload.build("head_set", {layer: {"heads": torch.tensor(sorted(heads))} for layer, heads in drawn.items()})


def _right(model: LocalSubject, questions: Sequence[Question], program: Program | None, grader: ChoiceGrader
           ) -> list[tuple[str, str]]:
    """Each answer with its outcome."""
    written = model.write([model.encode(prompt) for prompt, _ in questions], MAX_TOKENS, program)
    verdicts = grade(grader, [Answer(one.text, prompt, one.ended, (right,))
                              for one, (prompt, right) in zip(written, questions, strict=True)])
    return [(one.text, found.outcome) for one, found in zip(written, verdicts, strict=True)]


def _share(answers: Sequence[tuple[str, str]]) -> float:
    return round(sum(outcome == "right" for _, outcome in answers) / len(answers), 4)
