"""What is read of a model at every token: an artifact, how, and what follows from its scores."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints

from steering.language.fields import REF_PATTERN, ArtifactRef, Finite, Index, Model
from steering.language.layers import Layers
from steering.language.vocabulary import Form


class Watch(Model):
    """One monitor. It changes nothing."""

    artifact: ArtifactRef = Field(description="A probe, vector, sign pattern, manifold, SAE or normality artifact.")
    form: Form | None = Field(default=None, description="How it is read; none: the artifact's own form.")
    feature: Index | None = Field(default=None, description="Which feature, of an SAE.")
    layers: Layers | None = Field(default=None, description="Layers to read; none: the artifact's own.")
    trend: int | None = Field(default=None, strict=True, ge=4, le=256, description="Tell of every generated token how "
                              "steadily the scores of the last so many tokens rose or fell: Kendall's tau, from -1 to "
                              "1. A score that rises for long is an early warning where its value is none yet.")


def _named(value: Any) -> Any:
    return {"artifact": value} if isinstance(value, str) else value


# A monitor in either form; a bare name reads the artifact as it was made to be read.
GivenWatch = Annotated[Watch, BeforeValidator(_named, json_schema_input_type=Annotated[
    str, StringConstraints(pattern=REF_PATTERN)] | Watch)]


class MonitorLimit(Model):
    """A limit of a guard on what a monitor reads: the mean score of the tokens of a check."""

    artifact: ArtifactRef = Field(description="What is read, as in monitor.")
    form: Form | None = Field(default=None, description="How; none: the artifact's own form.")
    feature: Index | None = Field(default=None, description="Which feature, of an SAE.")
    threshold: Finite | None = Field(default=None, description="The mean score must not lie beyond it, on the side on "
                                     "which the artifact's concept lies; none: the threshold that it records for the "
                                     "form.")
