"""Arms of a trial: questions answered under programs, many at once, and graded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal

import torch

from steering.language.errors import SteeringOverflow
from steering.programs.program import Program
from vectors.evaluate.graders.contract import BROKEN, Answer, Grader, Tools
from vectors.evaluate.graders.grade import grade
from vectors.evaluate.graders.whole import WholeGrader
from vectors.extract.programs import program_of
from vectors.extract.subject import Subject, Tokens
from vectors.extract.trial.classifier import Classifier
from vectors.extract.trial.plan import Question, TrialPlan
from vectors.extract.trial.surface import Arm, Place

KEPT_TEXTS = 4
Step = Callable[[float], None]


@dataclass(frozen=True)
class Asked:
    """One arm that is wanted: the vectors of a place times a strength. share: that step over their length."""

    vectors: dict[int, torch.Tensor]
    share: float
    strength: float
    questions: Sequence[Question]


@dataclass
class Bench:
    """grader or classifier: one of them. usual: median surprise of untouched texts. threshold: of the classifier."""

    plan: TrialPlan
    subject: Subject
    tokens: int
    grader: Grader | None
    classifier: Classifier | None
    usual: float = 0.0
    threshold: float = 0.0
    written: int = field(default=0)

    def untouched(self, questions: Sequence[Question], step: Step) -> Arm:
        """The first arm, by which others are judged."""
        texts, surprises = self._write([(question, None) for question in questions], step)
        self.usual = median(surprises)
        if self.classifier is not None:
            self.threshold = self.classifier.threshold(self.classifier.scores([text for text, _ in texts], step))
        return self._graded(Asked({}, 0.0, 0.0, questions), texts, surprises, step)

    def instructed(self, questions: Sequence[Question], step: Step) -> Arm:
        """What the untouched model writes where it is asked for the same in words. That such texts are unlikely behind
        the question alone does not make them broken."""
        step(0.0)
        self.written += len(questions)
        written = self.subject.write([question.instructed for question in questions], self.tokens)
        surprises = self._surprises([question.tokens for question in questions], [one.ids for one in written])
        self.usual = max(self.usual, median(surprises))
        return self._graded(Asked({}, 0.0, 0.0, questions), [(one.text, one.ended) for one in written], surprises, step)

    def expect(self, log_odds: float) -> None:
        """Allow whole texts of the wanted kind to be as unlikely as that kind is: a person's French answer to an
        English question costs the untouched model more nats a token than the same answer in English, and so will the
        model's own. log_odds: of the pairs' positive against their negative continuations, untouched."""
        self.usual += max(0.0, -log_odds)

    def arms(self, asked: Sequence[Asked], step: Step) -> list[Arm]:
        """In order. All completions are written in one batch."""
        programs = [self.program(one) for one in asked]
        wanted = [(question, program) for one, program in zip(asked, programs, strict=True)
                  for question in one.questions]
        texts, surprises = self._write(wanted, step)
        found, start = [], 0
        for one in asked:
            stop = start + len(one.questions)
            found.append(self._graded(one, texts[start:stop], surprises[start:stop], step))
            start = stop
        return found

    def program(self, asked: Asked) -> Program:
        numbers = {layer: {"vector": asked.strength * vector} for layer, vector in asked.vectors.items()}
        return program_of(self.subject.facts, "vector", "add", self.plan.site, numbers, scope=self.plan.scope)

    def continued(self, asked: Sequence[Asked], count: int, limit: int,
                  side: Literal["positive", "negative"] = "positive") -> list[float]:
        """Under each program the mean log-probability, in nats a token, of the pairs' own continuations of one side;
        -inf where the program made values that are not finite."""
        chosen = self.plan.continuations[:count]
        texts = [getattr(pair, side)[:pair.start + limit] for pair in chosen]
        starts = [pair.start for pair in chosen]
        programs = [self.program(one) if one.vectors else None for one in asked]

        def of(some: Sequence[Program | None]) -> list[float]:
            values = self.subject.continuation_logprobs(texts * len(some), starts * len(some),
                                                        [program for program in some for _ in texts])
            return [fmean(values[n:n + len(texts)]) for n in range(0, len(values), len(texts))]

        try:
            return of(programs)
        except SteeringOverflow:
            # One of them: which it is, is told by each alone.
            found = []
            for program in programs:
                try:
                    found += of([program])
                except SteeringOverflow:
                    found.append(float("-inf"))
            return found

    def _write(self, wanted: Sequence[tuple[Question, Program | None]], step: Step
               ) -> tuple[list[tuple[str, bool]], list[float]]:
        """(text, ended by the model) and surprise under the untouched model, of each."""
        step(0.0)
        self.written += len(wanted)
        prompts = [question.tokens for question, _ in wanted]
        written = self.subject.write(prompts, self.tokens, [program for _, program in wanted])
        step(0.5)
        surprises = self._surprises(prompts, [one.ids for one in written])
        return [(one.text, one.ended) for one in written], surprises

    def _surprises(self, prompts: Sequence[Tokens], written: Sequence[Tokens]) -> list[float]:
        found = [0.0] * len(prompts)
        some = [n for n, ids in enumerate(written) if ids]
        logprobs = self.subject.continuation_logprobs([(*prompts[n], *written[n]) for n in some],
                                                      [len(prompts[n]) for n in some])
        for n, value in zip(some, logprobs, strict=True):
            found[n] = -value
        return found

    def _graded(self, asked: Asked, texts: Sequence[tuple[str, bool]], surprises: Sequence[float], step: Step) -> Arm:
        answers = [Answer(text, question.text, ended, question.expected)
                   for (text, ended), question in zip(texts, asked.questions, strict=True)]
        tools = Tools(usual_surprise=self.usual, surprise=lambda _: surprises)
        verdicts = grade(self.grader or WholeGrader(), answers, tools)
        outcomes = [verdict.outcome for verdict in verdicts]
        successes = [verdict.success for verdict in verdicts]
        score = fmean(map(float, successes))
        if self.grader is None and self.classifier is not None:
            scores = self.classifier.scores([text for text, _ in texts], step)
            above = [value > self.threshold for value in scores]
            outcomes = [BROKEN if outcome == BROKEN else "positive" if good else "other"
                        for outcome, good in zip(outcomes, above, strict=True)]
            successes = [outcome == "positive" for outcome in outcomes]
            score = fmean(scores)
        kept = tuple((question.text, text, outcome) for question, (text, _), outcome in
                     zip(asked.questions[:KEPT_TEXTS], texts, outcomes, strict=False))
        return Arm(asked.share, asked.strength, fmean(map(float, successes)),
                   outcomes.count(BROKEN) / len(outcomes), score, fmean(surprises), fmean(map(repeated, texts)),
                   len(texts), kept)


def repeated(written: tuple[str, bool]) -> float:
    """Share of the word triples of a text that stood there before."""
    words = written[0].split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def asked_at(place: Place, plan: TrialPlan, share: float, questions: Sequence[Question]) -> Asked:
    """The arm of a place at a step of `share` of the activations' length, over all of its layers together."""
    vectors = next(c.vectors for c in plan.candidates if c.name == place.candidate)
    strength = place.sign * share * place.size
    return Asked({layer: vectors[layer] for layer in place.layers}, share, float(f"{strength:.4g}"), questions)
