"""What a trial is given: candidates, the pairs behind them, questions to try them on, and what counts as a success."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field

from steering.language.fields import Model
from steering.language.scope import Scope
from steering.language.vocabulary import Site
from vectors.evaluate.graders.any import AnyGrader
from vectors.evaluate.graders.contract import Grader
from vectors.extract.subject import Prompt, Tokens
from vectors.extract.trial.effort import Effort


class TrialOptions(Model):
    """How what was made is tried: which layer and strength it gets by default is decided by what the model writes."""

    effort: Effort = Field(default="quick", description="How much is tried: none, quick (under a minute on a small "
                           "model and two free cores), normal or thorough.")
    prompts: Annotated[list[Prompt], Field(max_length=256)] = Field(
        default=[], description="Questions to try it on; by default those of the pairs that were not fitted on, or "
        "neutral ones.")
    instruction: Annotated[str, Field(max_length=4096)] | None = Field(
        default=None, description="What asks for the same in words, put behind each question: Answer in French. What "
        "the model writes when it is asked is shown beside what it writes when it is steered, which need not be whole "
        "more often than that.")
    grader: AnyGrader | None = Field(
        default=None, description="What counts as a success. By default a classifier of the pairs' positive against "
        "their negative texts, fitted on the pairs.")


@dataclass(frozen=True)
class Candidate:
    """name: what was read. vectors: layer -> `[width]`."""

    name: str
    vectors: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class Question:
    """A prompt that is answered in a trial. text: as graders may read it. expected: right answers, where known.
    instructed: the same with the instruction behind it; empty where there is none."""

    tokens: Tokens
    text: str = ""
    expected: tuple[str, ...] = ()
    instructed: Tokens = ()


@dataclass(frozen=True)
class Continuation:
    """Both texts of a pair, which differ from position `start` on."""

    positive: Tokens
    negative: Tokens
    start: int


@dataclass(frozen=True)
class TrialPlan:
    """grader: None for a classifier of `positive` against `negative`, texts that were fitted on. scales: layer -> mean
    length of the activations there, of which a strength is a share."""

    options: TrialOptions
    site: Site
    candidates: Sequence[Candidate]
    scales: Mapping[int, float]
    continuations: Sequence[Continuation]
    questions: Sequence[Question]
    grader: Grader | None
    positive: Sequence[str] = ()
    negative: Sequence[str] = ()
    scope: Scope = field(default_factory=Scope)
    # Layers worth looking at first, by a cheap reading: AUC on dev, say.
    reading: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
