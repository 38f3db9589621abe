"""What a recipe is - a method with data and artifact kind of its own - and the registry of recipes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field, ValidationError

from steering.artifacts.payload import Kind, Payload
from steering.language.errors import InvalidRequest
from steering.language.fields import Model
from steering.language.gates import Reading
from steering.language.layers import Layers
from steering.language.scope import Scope
from steering.language.strength import Strength
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from steering.programs.layers import explicit_layers
from vectors.artifact import Metadata, Name, Tags, Text
from vectors.extract.contract import Cancelled, Extraction, Progress
from vectors.extract.errors import ExtractionCancelled
from vectors.extract.spelling import SpellingSubject
from vectors.extract.subject import Subject

M = TypeVar("M", bound=Model)


class RecipeOptions(Model):
    """What every recipe takes."""

    name: Name = Field(description="Artifact to make, or to make a new version of.")
    layers: Layers = Field(default="all", description="Layers to consider; those the model lacks the site at are "
                           "left out of all.")
    draws: int = Field(default=20, ge=20, le=1000, description="Random draws of every control.")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of splits and controls.")
    description: Text = Field(default="", description="What the artifact does, for people.")
    tags: Tags = Field(default=(), description="Labels to filter by.")

    def generator(self, salt: int) -> torch.Generator:
        """A generator of its own for each use, so that one use does not shift the numbers of the next."""
        return torch.Generator().manual_seed((self.seed << 16) + salt)


@dataclass(frozen=True)
class Work:
    """One run of a recipe: the model, and who is told of progress and asked about cancelling."""

    subject: Subject
    progress: Progress
    cancelled: Cancelled
    created_by: str

    @property
    def facts(self) -> ModelFacts:
        return self.subject.facts

    def at(self, share: float, stage: str) -> None:
        """Tell of progress.

        Raises:
            ExtractionCancelled: the work is no longer wanted.
        """
        if self.cancelled():
            raise ExtractionCancelled("the extraction was cancelled")
        self.progress(share, stage)

    def within(self, start: float, stop: float, stage: str) -> "Span":
        return Span(self, start, stop, stage)


@dataclass(frozen=True)
class Span:
    """A part of the work: its own share from 0 to 1 is told as one of the whole."""

    work: Work
    start: float
    stop: float
    stage: str

    def __call__(self, share: float) -> None:
        self.work.at(self.start + (self.stop - self.start) * share, self.stage)

    def part(self, done: int, count: int) -> "Span":
        """Number `done` of `count` equal parts."""
        width = (self.stop - self.start) / count
        return Span(self.work, self.start + done * width, self.start + (done + 1) * width, self.stage)


@dataclass(frozen=True)
class Made:
    """What a recipe found, before it is written down as an artifact.

    dev, test: the same measures on both splits, as far as both were measured. card: what else the card tells.
    default_layers: None for all layers that have numbers. scope: the tokens it was made for, kept in the card.
    data: what the numbers were taken from (digest and counts), for the provenance.
    """

    kind: Kind
    op: Op
    site: Site
    numbers: Mapping[int, Mapping[str, torch.Tensor]]
    sign_convention: str
    report: Mapping[str, Any]
    dev: Mapping[str, Any]
    test: Mapping[str, Any]
    card: Mapping[str, Any]
    data: Mapping[str, Any]
    default_layers: Sequence[int] | None = None
    strength: Strength = Strength(value=1.0)
    options: Mapping[str, Any] | None = None
    scope: Scope | None = None
    residual_norm: Mapping[int, float] | None = None
    sigma: Mapping[int, float] | None = None
    reading: Reading | None = None


class Recipe(ABC):
    """One extraction method. `request` is what it takes; `summary` is one line for people."""

    name: ClassVar[str]
    summary: ClassVar[str]
    request: ClassVar[type[RecipeOptions]]

    @abstractmethod
    def make(self, request: Any, work: Work) -> Made:
        """Find the numbers. Deterministic for equal requests.

        Raises:
            TrimtabError: InvalidData and its kinds, InvalidRequest for options, ExtractionCancelled.
        """

    @classmethod
    def data_field(cls) -> str:
        """The field that takes the data: the first list that must be given, unless a recipe says otherwise."""
        return next(name for name, field in cls.request.model_fields.items()
                    if name not in RecipeOptions.model_fields and field.is_required())


_RECIPES: dict[str, Recipe] = {}


def register(cls: type[Recipe]) -> type[Recipe]:
    """Class decorator: make the recipe known. Each name is registered once."""
    if cls.name in _RECIPES:
        raise ValueError(f"recipe {cls.name!r} is registered twice")
    _RECIPES[cls.name] = cls()
    return cls


def get_recipe(name: str) -> Recipe:
    """Raises InvalidRequest: no recipe has this name."""
    if name not in _RECIPES:
        raise InvalidRequest(f"there is no extraction method {name[:64]!r}", param="method",
                             fix=f"Use one of {', '.join(sorted(_RECIPES))}.")
    return _RECIPES[name]


def recipes() -> tuple[Recipe, ...]:
    return tuple(_RECIPES[name] for name in sorted(_RECIPES))


def parse_request(name: str, fields: Mapping[str, Any]) -> RecipeOptions:
    """The recipe's request from plain data.

    Raises:
        InvalidRequest: naming the field.
    """
    return parse_fields(get_recipe(name).request, fields)


def parse_fields(model: type[M], fields: Mapping[str, Any]) -> M:
    """A model of options from plain data.

    Raises:
        InvalidRequest: naming the field.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise InvalidRequest(first["msg"], param=param) from None


def run_recipe(name: str, request: RecipeOptions, subject: Subject, progress: Progress, cancelled: Cancelled,
               created_by: str) -> Extraction:
    """From request to artifact.

    Raises:
        TrimtabError: InvalidData and its kinds, InvalidRequest for options, ExtractionCancelled.
    """
    recipe = get_recipe(name)
    counting = SpellingSubject(subject)
    work = Work(counting, progress, cancelled, created_by)
    work.at(0.0, "capture")
    made = recipe.make(request, work)
    report = {**made.report, **counting.report()}
    facts = work.facts
    card = {"layers": sorted(made.default_layers if made.default_layers is not None else made.numbers),
            "strength": made.strength.model_dump(mode="json"), "dev": dict(made.dev), "test": dict(made.test),
            **made.card, "controls": _controls(made.report)}
    if made.scope is not None:
        card["scope"] = made.scope.model_dump(mode="json", exclude_defaults=True)
    metadata = Metadata.parse({
        "name": request.name, "kind": made.kind, "op": made.op, "site": made.site,
        "layers": None if made.default_layers is None else list(made.default_layers), "strength": made.strength,
        "options": dict(made.options or {}), "sign_convention": made.sign_convention,
        "description": request.description, "tags": request.tags, "model_id": facts.model_id,
        "fingerprint": facts.fingerprint, "d_model": facts.d_model, "residual_norm": dict(made.residual_norm or {}),
        "sigma": dict(made.sigma or {}), "reading": made.reading, "card": card,
        "provenance": {"method": recipe.name, **made.data, "seed": request.seed, "created_by": created_by,
                       "report": report},
    })
    payload = Payload.build(made.kind, {layer: {name: tensor if not tensor.is_floating_point() else tensor.float()
                                                for name, tensor in tensors.items()}
                                        for layer, tensors in made.numbers.items()})
    work.at(1.0, "control")
    return Extraction(metadata, payload, report)


def _controls(report: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Every figure of the report that was measured against draws, under its dotted path: what the card says of them."""
    found: dict[str, Any] = {}
    for name, value in report.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            if {"found", "draws", "percentile"} <= value.keys():
                found[where.removeprefix("controls.")] = dict(value)
            else:
                found |= _controls(value, where)
    return found


def site_layers(options: RecipeOptions, site: Site, facts: ModelFacts) -> list[int]:
    """The layers to work on, rising.

    Raises:
        UnsupportedSite, LayerOutOfRange: a layer asked for that is not offered.
    """
    offered = facts.sites.get(site, ())
    if options.layers == "all" and offered:
        return sorted(offered)
    layers = sorted(explicit_layers(options.layers, facts))
    for layer in layers:
        facts.check_site(site, layer, "layers")
    return layers
