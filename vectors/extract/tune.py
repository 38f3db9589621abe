"""Tuning: the trial of a stored vector again, for other prompts or another meaning of success."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidRequest
from steering.language.fields import Model
from steering.language.strength import Strength
from vectors.artifact import Metadata
from vectors.extract.contract import Cancelled, Extraction, Progress
from vectors.extract.contrasts import continuations_of, default_questions, given_questions, texts_of
from vectors.extract.data import SPLITS, Dataset
from vectors.extract.recipe import Recipe
from vectors.extract.run import chance_warnings
from vectors.extract.subject import Subject
from vectors.extract.text_pairs import TextPair, paired
from vectors.extract.trial import search
from vectors.extract.trial.effort import BUDGETS, SCORED_TOKENS, seconds
from vectors.extract.trial.plan import Candidate, Question, TrialOptions, TrialPlan
from vectors.extract.work import Work


class TuneRequest(Model):
    """What a stored vector is tried on. A success is told by a grader, or by pairs of texts that show it."""

    trial: TrialOptions = Field(default=TrialOptions(), description="Prompts, grader and effort.")
    pairs: Annotated[list[TextPair], Field(max_length=100_000)] = Field(
        default=[], description="Pairs of texts that differ in what it is for; needed where no grader is named.")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(default=0, description="Seed of splits and random vectors.")


@dataclass(frozen=True)
class Tuning:
    """A checked request."""

    metadata: Metadata
    payload: Payload
    request: TuneRequest
    data: Dataset
    texts: tuple[list[str], list[str]]
    questions: Sequence[Question]
    subject: Subject

    def estimate(self, sample: Sequence[int]) -> float:
        """Seconds that it will take, by how long the model needs for `sample` now."""
        budget = BUDGETS[self.request.trial.effort]
        longest = max((len(question.tokens) for question in self.questions), default=len(sample))
        return seconds(budget.work(longest, SCORED_TOKENS), self.subject, sample)

    def run(self, progress: Progress, cancelled: Cancelled) -> Extraction:
        """A new version, which differs in its default layers and strength and in what its card says of the trial.

        Raises:
            ExtractionCancelled. TrimtabError: the grader fails.
        """
        work = Work(self.subject, progress, cancelled, "tune")
        metadata, request = self.metadata, self.request
        plan = TrialPlan(
            options=request.trial, site=metadata.site, grader=request.trial.grader, positive=self.texts[0],
            negative=self.texts[1], continuations=continuations_of(self.data), questions=self.questions,
            candidates=[Candidate(str(metadata.provenance.get("token", "stored")),
                                  {layer: own["vector"].double() for layer, own in self.payload.layers.items()})],
            scales=metadata.residual_norm)
        generator = torch.Generator().manual_seed(request.seed)
        found = search.run(plan, self.subject, generator, work.within(0.0, 1.0, "trial"))
        card: dict[str, Any] = {name: value for name, value in (metadata.card or {}).items()
                                if name not in ("draft", "warnings", "calibration", "trial")}
        card["trial"] = found.card
        warnings = chance_warnings({"test": {}, **card}, Recipe.chance)
        if found.draft is not None:
            card["draft"] = found.draft
            warnings.append(f"draft: {found.draft}")
        if warnings:
            card["warnings"] = warnings
        if found.place is not None:
            card["layers"] = list(found.place.layers)
        adapter = self.subject.facts.adapter
        tuned_on: dict[str, Any] = {} if adapter is None else {"tuned_on_adapter": adapter}
        made = metadata.model_copy(update={
            "card": card, "provenance": dict(metadata.provenance) | tuned_on,
            "layers": metadata.layers if found.place is None else list(found.place.layers),
            "strength": metadata.strength if found.place is None else Strength(value=found.strength)})
        return Extraction(Metadata.parse(made.model_dump()), self.payload,
                          {"method": "tune", "trial": found.card, "warnings": warnings})


def prepare_tuning(metadata: Metadata, payload: Payload, request: TuneRequest, subject: Subject) -> Tuning:
    """Raises InvalidRequest: what is stored is no vector of known scale, or nothing says which answers are a success;
    InvalidData."""
    if metadata.kind != "vector" or metadata.op != "add" or not metadata.residual_norm:
        raise InvalidRequest(f"{metadata.name} is not a vector to add whose layers have a residual_norm", param="name",
                             fix="Tune what an extraction made for the op add.")
    if metadata.fingerprint not in (None, subject.facts.fingerprint):
        raise InvalidRequest(f"{metadata.name} was made on another model", param="name")
    if request.trial.effort == "none":
        raise InvalidRequest("tuning needs a trial, and effort is none", param="trial.effort", fix="Use quick.")
    if not request.pairs and (request.trial.grader is None or not request.trial.prompts):
        raise InvalidRequest("nothing says which answers are a success", param="pairs",
                             fix="Give pairs of texts, or both trial.grader and trial.prompts.")
    data = paired(request.pairs, subject, request.seed) if request.pairs else Dataset((), dict.fromkeys(SPLITS, ()), "")
    texts = texts_of(request.pairs, data)
    if texts is None:
        raise InvalidRequest("pairs of token ids have no text to tell a success by", param="pairs",
                             fix="Give texts, or trial.grader.")
    return Tuning(metadata, payload, request, data, texts,
                  given_questions(request.trial, request.pairs, subject)
                  or default_questions(request.trial, request.pairs, data, subject), subject)
