"""From a request to an artifact, by any method: the data are checked first, then the numbers are made and written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steering.artifacts.payload import Payload
from vectors.artifact import Metadata
from vectors.evaluate.graders.contract import Grader
from vectors.extract.answers import AnsweredOptions, judged, questions_of, refused_as, tokens_of
from vectors.extract.contract import Cancelled, Extraction, Progress
from vectors.extract.items import digest_of
from vectors.extract.plain import left_out
from vectors.extract.recipe import Made, Recipe, RecipeOptions
from vectors.extract.registry import get_recipe
from vectors.extract.spelling import SpellingSubject
from vectors.extract.subject import Subject
from vectors.extract.trial.effort import seconds
from vectors.extract.trial.plan import Question
from vectors.extract.work import Work

# Below these a measure is what luck reaches.
LOW_AUC, LOW_PERCENTILE = 0.65, 90.0
# Share of a run in which the numbers are made, where whole answers are judged after that.
MAKING = 0.8


@dataclass(frozen=True)
class Prepared:
    """A checked request that has not run yet. data: what the recipe's `prepare` returned. questions: whose whole
    answers are judged; none where no grader is named."""

    recipe: Recipe
    request: RecipeOptions
    data: Any
    questions: Sequence[Question]
    subject: SpellingSubject
    created_by: str

    def estimate(self, sample: Sequence[int]) -> float | None:
        """Seconds that the run will take, by how long the model needs for `sample` now; None where nobody knows."""
        tokens = self.recipe.passes(self.request, self.data, self.subject.facts)
        if tokens is not None:
            tokens += tokens_of(self.questions)
        if tokens is None:
            return None
        own = self.recipe.computing(self.request, self.data)
        return float(f"{seconds(tokens, self.subject, sample) + own:.2g}")

    @property
    def digest(self) -> str:
        """The same for requests that find the same numbers in the same model."""
        facts = self.subject.facts
        fields = self.request.model_dump(mode="json", exclude={"name", "description", "tags"})
        return digest_of([self.recipe.name, fields, facts.fingerprint, str(facts.adapter)])

    def run(self, progress: Progress, cancelled: Cancelled, checkpoint: Path | None = None) -> Extraction:
        """checkpoint: a file in which a long run keeps what it has, and goes on from what it finds there. Whoever names
        it removes it when the artifact is stored.

        Raises TrimtabError: InvalidData and its kinds, ExtractionCancelled.
        """
        # What the model itself says and is asked in between is no data, whose spelling is of no interest.
        making = 1.0 if self._grader is None else MAKING
        work = Work(self.subject.uncounted, lambda share, stage: progress(making * share, stage), cancelled,
                    self.created_by, checkpoint)
        work.at(0.0, "capture")
        made = self._judged(self.recipe.make(self.request, self.data, work), progress, cancelled)
        found = _written(self, made)
        progress(1.0, "control")
        return found

    @property
    def _grader(self) -> Grader | None:
        return self.request.grader if isinstance(self.request, AnsweredOptions) else None

    def _judged(self, made: Made, progress: Progress, cancelled: Cancelled) -> Made:
        """With what whole answers are, where a grader was named; they have the last word on whether it is a draft."""
        if self._grader is None:
            return made
        work = Work(self.subject.uncounted, progress, cancelled, self.created_by)
        found = judged(made, self.recipe.scope, self._grader, self.questions, self.subject.uncounted,
                       self.request.seed, work.within(MAKING, 1.0, "trial"))
        return replace(made, card={**made.card, "answers": found}, report={**made.report, "answers": found},
                       draft=made.draft or refused_as(found, LOW_PERCENTILE))


def prepare(method: str, request: RecipeOptions, subject: Subject, created_by: str) -> Prepared:
    """Check a request as far as tokens and the model's facts can tell.

    Raises:
        TrimtabError: InvalidData and its kinds, InvalidRequest for options.
    """
    recipe = get_recipe(method)
    counting = SpellingSubject(subject)
    data = recipe.prepare(request, counting)
    return Prepared(recipe, request, data, questions_of(recipe, request, data, subject), counting, created_by)


def _written(prepared: Prepared, made: Made) -> Extraction:
    request, facts = prepared.request, prepared.subject.facts
    spelling = prepared.subject.report()
    report = {**made.report, **spelling}
    if prepared.recipe.without_massive and (dims := left_out(facts, made.site, sorted(made.numbers))):
        report["massive_dims_left_out"] = dims
    card = {"layers": sorted(made.default_layers if made.default_layers is not None else made.numbers),
            "strength": made.strength.model_dump(mode="json"), "dev": dict(made.dev), "test": dict(made.test),
            **made.card, "controls": _controls(made.report)}
    # Both the method and the spelling of the data may warn.
    warnings = [*made.report.get("warnings", ()), *spelling.get("warnings", ()),
                *chance_warnings(card, prepared.recipe.chance)]
    draft = made.draft or _no_effect(prepared.recipe, card)
    if draft is not None:
        card["draft"] = draft
        warnings.append(f"draft: {draft}")
    if draft is None and (untried := _untried(prepared, card)) is not None:
        card["untried"] = untried
    if warnings:
        report["warnings"] = card["warnings"] = warnings
    metadata = Metadata.parse({
        "name": request.name, "kind": made.kind, "op": made.op, "site": made.site,
        "layers": None if made.default_layers is None else list(made.default_layers), "strength": made.strength,
        "options": dict(made.options or {}), "sign_convention": made.sign_convention,
        "description": request.description, "tags": request.tags, "model_id": facts.model_id,
        "fingerprint": facts.fingerprint, "d_model": facts.d_model, "residual_norm": dict(made.residual_norm or {}),
        "sigma": dict(made.sigma or {}), "reading": made.reading, "scope": prepared.recipe.scope, "card": card,
        "provenance": {"method": prepared.recipe.name, **made.data, "seed": request.seed,
                       "created_by": prepared.created_by, "report": report,
                       **({} if facts.adapter is None else {"adapter": facts.adapter})},
    })
    payload = Payload.build(made.kind, {layer: {name: tensor if not tensor.is_floating_point() else tensor.float()
                                                for name, tensor in tensors.items()}
                                        for layer, tensors in made.numbers.items()})
    return Extraction(metadata, payload, report)


def _untried(prepared: Prepared, card: Mapping[str, Any]) -> str | None:
    """Why the model wrote no whole answers under what was made; None where it did."""
    recipe = prepared.recipe
    if "trial" in card or "answers" in card:
        return None
    if recipe.effect is None or recipe.effect not in card:
        return recipe.untried
    named = "no grader was named" if isinstance(prepared.request, AnsweredOptions) else "the method has no grader"
    return f"what it does was told by the first tokens of answers; no whole ones were judged, because {named}"


def _no_effect(recipe: Recipe, card: Mapping[str, Any]) -> str | None:
    """Why what was made is a draft: it changes the model's answers no more than random ones of equal size do."""
    # Whole answers were judged already, and say more than first tokens do.
    percentile = card.get(recipe.effect) if recipe.effect is not None and "answers" not in card else None
    if percentile is None or percentile >= LOW_PERCENTILE:
        return None
    return (f"what it does to the model's answers is more than {percentile:.0f} % of random ones of equal size do, and "
            f"{LOW_PERCENTILE:.0f} % are needed to tell it from luck")


def chance_warnings(card: Mapping[str, Any], percentiles: Mapping[str, str]) -> list[str]:
    """What a card says that is no better than chance, in sentences."""
    found = []
    auc = card["test"].get("auc")
    if isinstance(auc, float) and auc < LOW_AUC:
        found.append(f"held-out texts are told apart with an AUC of {auc:.2f} only; 0.5 is chance")
    for name, what in percentiles.items():
        percentile = card.get(name)
        if isinstance(percentile, float) and percentile < LOW_PERCENTILE:
            found.append(f"it is better than {percentile:.0f} % of {what} only, which is within chance")
    return found


def _controls(report: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Every figure of the report that was measured against draws, under its dotted path, as the card tells it."""
    found: dict[str, Any] = {}
    for name, value in report.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            if {"found", "draws", "percentile"} <= value.keys():
                found[where.removeprefix("controls.")] = dict(value)
            else:
                found |= _controls(value, where)
    return found
