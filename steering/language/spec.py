"""The `steering` field of a request. Together with the models that it is built from, this is the wire format.

`docs/spec.md` is generated from these models.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from steering.language.contrast import Contrast
from steering.language.fields import MAX_INTERVENTIONS, MAX_MONITORS, ArtifactRef, Model, Switch
from steering.language.guard import Guard
from steering.language.intervention import Intervention
from steering.language.strength import GivenStrength
from steering.language.watch import GivenWatch

Report = Literal["none", "summary", "tokens", "outcome"]
MAX_GRADERS = 4
# A grader by name ("refusal", "language=fr"), or with all its options. Which there are the server knows.
AskedGrader = Annotated[str, StringConstraints(min_length=1, max_length=256)] | dict[
    Annotated[str, StringConstraints(max_length=32)], Any]


def _lasting(given: list[Intervention]) -> list[Intervention]:
    for n, one in enumerate(given):
        if one.captured is not None:
            raise ValueError(f"intervention {n} patches from captured activations, which expire; a spec that is stored "
                             "or evaluated cannot name them. Store their row as an artifact, or name them in the "
                             "request itself")
    return given


# Of specs that outlive a request.
LastingInterventions = Annotated[list[Intervention], AfterValidator(_lasting)]


class Spec(Model):
    """An ordered list of interventions. Their order matters, because each acts on what the one before left."""

    interventions: LastingInterventions = Field(max_length=MAX_INTERVENTIONS, description="In order of action.")
    guard: Guard | None = Field(default=None, description="Limits that hold while a completion is generated.")


class Steering(Model):
    """The `steering` field of a request."""

    interventions: list[Intervention] = Field(default=[], max_length=MAX_INTERVENTIONS,
                                              description="In order of action.")
    artifact: ArtifactRef | None = Field(
        default=None, description="Short for one intervention with this artifact and nothing else: "
        '`{"artifact": NAME}` is `{"interventions": [{"artifact": NAME}]}`.')
    strength: GivenStrength = Field(default=None, description="How strong that one is. Only with `artifact`.")
    preset: ArtifactRef | None = Field(default=None, description="A stored spec that acts before `interventions`.")
    default: Literal["inherit", "none", "override"] = Field(
        default="inherit", description="What becomes of the server's default spec. inherit: it acts first. override: "
        "this spec takes its place. none: there is no steering at all.")
    report: Report = Field(
        default="none", description="summary: the receipt holds measured totals of the effect. tokens: it holds them "
        "for each generated token as well. outcome: it holds, besides the totals, what the whole answer is by "
        "`graders`.")
    graders: list[AskedGrader] = Field(
        default=[], max_length=MAX_GRADERS, description='What grades the answer with `"report": "outcome"`: "refusal", '
        '"language=fr" or a grader as an object, as evaluations take it. None: refusal, which tells answered, refused '
        "and broken.")
    required: Switch = Field(
        default=False, description="Refuse the request where nothing would be applied, because every strength is zero "
        "or the kill switch is on. A completion that runs when the switch is turned on ends there.")
    guard: Guard | None = Field(default=None, description="Limits that hold while a completion is generated, beside "
                                "those of the preset and the default spec.")
    monitor: list[GivenWatch] = Field(
        default=[], max_length=MAX_MONITORS, description="Artifacts to read at every token, without changing anything, "
        "by name or with how they are read; see Reading.")
    contrast: Contrast | None = Field(default=None, description="Decode from the difference between this spec's run "
                                      "and a weak one.")

    @model_validator(mode="after")
    def _tri_state(self) -> Self:
        given = bool(self.interventions) or self.preset is not None or self.artifact is not None
        if self.default == "none" and (given or self.contrast is not None):
            raise ValueError('default "none" means no steering at all; use "override" to steer with this spec only')
        if self.default == "override" and not given and self.contrast is None:
            raise ValueError('default "override" needs interventions or a preset; use "none" to switch steering off')
        return self

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.artifact is not None and self.interventions:
            raise ValueError("artifact is short for one intervention; give either artifact or interventions")
        if self.strength is not None and self.artifact is None:
            raise ValueError("a strength stands in an intervention, or beside `artifact`")
        if self.graders and self.report != "outcome":
            raise ValueError('graders are asked with "report": "outcome"')
        return self

    @property
    def short(self) -> Intervention | None:
        """The intervention that `artifact` is short for."""
        return None if self.artifact is None else Intervention(artifact=self.artifact, strength=self.strength)
