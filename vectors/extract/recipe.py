"""The contract of extraction: what a method declares, what it is given and what it hands back.

Every method is a recipe, in a file of its own under `methods/`; `registry.py` is the table of them. A run goes straight
through four steps: the request is parsed (`registry.parse_request`), the data are checked (`Recipe.prepare`, without
asking the model for anything but tokens), the numbers are made (`Recipe.make`), the artifact is written (`run.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from steering.artifacts.payload import Kind
from steering.language.fields import Model
from steering.language.gates import Reading
from steering.language.layers import Layers
from steering.language.scope import Scope
from steering.language.strength import Strength
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from steering.programs.layers import explicit_layers
from vectors.artifact import Name, Tags, Text
from vectors.extract.subject import Subject
from vectors.extract.trial.plan import Question
from vectors.extract.work import Work


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
class Made:
    """What a recipe found, before it is written down as an artifact.

    dev, test: the same measures on both splits, as far as both were measured. card: what else the card tells.
    default_layers: None for all layers that have numbers. draft: why it is no finished artifact, in a sentence.
    data: what the numbers were taken from (digest and counts), for the provenance.
    """

    kind: Kind
    op: Op | None
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
    residual_norm: Mapping[int, float] | None = None
    sigma: Mapping[int, float] | None = None
    reading: Reading | None = None
    draft: str | None = None


class Recipe(ABC):
    """One extraction method.

    name: how requests call it; also the name of its module. summary: one line for people. request: the fields that it
    takes, data among them. ops: what its artifacts may be applied with. sites: where they act; empty where the request
    names the site. scope: the tokens that an artifact acts on unless a spec says otherwise; None for all of them.
    finishes: trial, where layers and strength are chosen by what the model writes under them; own, where the method has
    a choice and a test of its own, or makes what is read and not applied. effect: of the latter, the percentile on the
    card that tells how what was made changes the model's answers, among random ones of equal size: below
    `run.LOW_PERCENTILE` it is a draft. untried: why nothing was tried, where neither is on the card. chance:
    percentiles of the card that are no better than luck where they are low, and among what. without_massive: massive
    dims of the model are left out of what is made.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    request: ClassVar[type[RecipeOptions]]
    ops: ClassVar[tuple[Op, ...]]
    sites: ClassVar[tuple[Site, ...]] = ()
    scope: ClassVar[Scope | None] = None
    finishes: ClassVar[Literal["trial", "own"]] = "own"
    effect: ClassVar[str | None] = None
    untried: ClassVar[str | None] = None
    without_massive: ClassVar[bool] = False
    chance: ClassVar[Mapping[str, str]] = {"random_percentile": "random directions",
                                           "shuffled_percentile": "fits on dealt labels"}

    @abstractmethod
    def prepare(self, request: Any, subject: Subject) -> Any:
        """Check the options and the data, and return the data as `make` wants them. The model is asked for its facts
        and for tokens only, so that a job is refused before it waits in a queue.

        Raises:
            TrimtabError: InvalidData and its kinds, InvalidRequest for options.
        """

    @abstractmethod
    def make(self, request: Any, data: Any, work: Work) -> Made:
        """Find the numbers, from what `prepare` returned. Deterministic for equal requests.

        Raises:
            TrimtabError: InvalidData and its kinds, ExtractionCancelled.
        """

    def passes(self, request: Any, data: Any, facts: ModelFacts) -> int | None:
        """Tokens that `make` puts through the model, about; None where nobody has counted them."""
        return None

    def computing(self, request: Any, data: Any) -> float:
        """Seconds that `make` computes itself, about, beside what the model needs."""
        return 0.0

    def questions(self, request: Any, data: Any) -> Sequence[Question]:
        """Held-out prompts whose whole answers tell what was made, for requests that name a grader."""
        return ()

    @classmethod
    def data_field(cls) -> str:
        """The field that takes the data: the first list that must be given, unless a recipe says otherwise."""
        return next(name for name, field in cls.request.model_fields.items()
                    if name not in RecipeOptions.model_fields and field.is_required())


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
