"""The `steering` field of a request. Together with the models that it is built from, this is the wire format.

`docs/spec.md` is generated from these models.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from steering.language.fields import MAX_INTERVENTIONS, MAX_MONITORS, ArtifactRef, Model, Switch
from steering.language.guard import Guard
from steering.language.intervention import Intervention


class Spec(Model):
    """An ordered list of interventions. Their order matters, because each acts on what the one before left."""

    interventions: list[Intervention] = Field(max_length=MAX_INTERVENTIONS, description="In order of action.")
    guard: Guard | None = Field(default=None, description="Limits that hold while a completion is generated.")


class Steering(Model):
    """The `steering` field of a request."""

    interventions: list[Intervention] = Field(default=[], max_length=MAX_INTERVENTIONS,
                                              description="In order of action.")
    preset: ArtifactRef | None = Field(default=None, description="A stored spec that acts before `interventions`.")
    default: Literal["inherit", "none", "override"] = Field(
        default="inherit", description="What becomes of the server's default spec. inherit: it acts first. override: "
        "this spec takes its place. none: there is no steering at all.")
    report: Literal["none", "summary", "tokens"] = Field(
        default="none", description="summary: the receipt holds measured totals of the effect. tokens: it holds them "
        "for each generated token as well.")

    required: Switch = Field(
        default=False, description="Refuse the request where nothing would be applied, because every strength is zero "
        "or the kill switch is on. A completion that runs when the switch is turned on ends there.")
    guard: Guard | None = Field(default=None, description="Limits that hold while a completion is generated, beside "
                                "those of the preset and the default spec.")
    monitor: list[ArtifactRef] = Field(
        default=[], max_length=MAX_MONITORS, description="Probes, vectors, sign patterns or manifolds to read at every "
        "token, without changing anything; see Reading.")

    @model_validator(mode="after")
    def _tri_state(self) -> Self:
        given = bool(self.interventions) or self.preset is not None
        if self.default == "none" and given:
            raise ValueError('default "none" means no steering at all; use "override" to steer with this spec only')
        if self.default == "override" and not given:
            raise ValueError('default "override" needs interventions or a preset; use "none" to switch steering off')
        return self
