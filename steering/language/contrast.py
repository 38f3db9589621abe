"""A contrast: what is decoded from two runs of the model, the request's own and a weak one."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from steering.language.fields import MAX_INTERVENTIONS, ArtifactRef, Fraction, Model
from steering.language.intervention import Intervention
from steering.language.strength import GivenStrength


class Weak(Model):
    """The spec of the weak run. Empty, it is the model as it is without what the request asks for."""

    interventions: list[Intervention] = Field(default=[], max_length=MAX_INTERVENTIONS,
                                              description="In order of action.")
    artifact: ArtifactRef | None = Field(default=None, description="Short for one intervention with this artifact.")
    strength: GivenStrength = Field(default=None, description="How strong that one is. Only with `artifact`.")
    preset: ArtifactRef | None = Field(default=None, description="A stored spec that acts before `interventions`.")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.artifact is not None and self.interventions:
            raise ValueError("artifact is short for one intervention; give either artifact or interventions")
        if self.strength is not None and self.artifact is None:
            raise ValueError("a strength stands in an intervention, or beside `artifact`")
        return self

    @property
    def short(self) -> Intervention | None:
        """The intervention that `artifact` is short for."""
        return None if self.artifact is None else Intervention(artifact=self.artifact, strength=self.strength)


class Contrast(Model):
    """Decode from the difference of two runs, which read the same tokens.

    Strong is the request's own spec, weak another one. At each step the logits are
    `(1 + beta) * strong - beta * weak` for the tokens whose probability in the strong run is at least `alpha` times
    that of its likeliest one, and no other token can come. Temperature and all else that sampling is asked for come
    after it. What the server does of itself (default spec, mandatory specs) acts in both runs.
    """

    weak: Weak = Field(description="The spec of the weak run.")
    alpha: Fraction = Field(default=0.1, description="Least share of the strong run's top probability that a token "
                            "must have. 0: none is left out.")
    beta: Annotated[float, Field(strict=True, ge=0, le=100)] = Field(
        default=0.5, description="How much of the difference is added to the strong logits. 0: there is no contrast "
        "and no second run, and nothing is left out.")
