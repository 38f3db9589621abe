"""Readings, and the gates that compare them with a threshold."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from steering.language.fields import MAX_GATES, ArtifactRef, Finite, Index, Model
from steering.language.layers import Layers
from steering.language.vocabulary import Direction, Form, Pooling


class Reading(Model):
    """How an artifact is read. Activations of its site and layers become one number for each token, and one for a
    prompt.

    linear is weight . h + bias for a probe and h . v for a vector. cosine is the cosine of h and the vector. cast is
    cos(h, tanh(P h)), P being the projection on the vector; it says how much of h lies along the vector, and not on
    which side. agreement is the share of a sign pattern's dims that have its sign. distance is that from the nearest
    sampled point of a manifold, in its subspace. feature is the value of one feature of an SAE. The forms of a
    normality artifact say how unlike normal text a token is: mahalanobis and residual (about 1 for normal ones),
    membership (share of bits in which its pattern differs from the nearest known one), spectral and diffusion (of the
    last tokens together, in standard deviations).

    mean: of the prompt's activations, read once (of forms that are not linear, of the tokens' scores); max: of the
    tokens' scores; both leave out the first token, which many models use as a sink, where there are others. last: the
    last prompt token's.
    """

    form: Form = Field(default="linear", description="How activations become numbers; see above.")
    pool: Pooling = Field(default="mean", description="How a prompt's tokens become one number.")
    threshold: Finite | None = Field(default=None, description="The score that separates the two classes.")
    direction: Direction = Field(default="above", description="The side of the threshold on which the concept lies.")


class Gate(Model):
    """A condition under which an intervention acts: the score of an artifact that can be read, and a threshold.

    What is not given is taken from the artifact's own reading. Where several layers are read, one score on the right
    side is enough.
    """

    probe: ArtifactRef = Field(description="A probe, vector, sign pattern, manifold or SAE of the library.")
    feature: Index | None = Field(default=None, description="Which feature, of an SAE.")
    threshold: Finite | None = Field(default=None, description="Score to compare with.")
    direction: Direction | None = Field(default=None, description="Open when the score is above or below it.")
    form: Form | None = Field(default=None, description="How it is read; see Reading.")
    pool: Pooling | None = Field(default=None, description="mean, max or last token of the prompt; see Reading.")
    layers: Layers | None = Field(default=None, description="Layers to read.")
    when: Literal["prompt", "token"] = Field(
        default="prompt", description="prompt: decided once for each prompt, from the untouched model, and valid for "
        "the whole completion. token: decided for each token, from its activation where the intervention acts.")
    override: list[Literal["model"]] = Field(
        default=[], max_length=8, description="Use the probe although it was made for another model.")


class Gates(Model):
    """Several gates joined into one, which is open if all of them are, or if any of them is."""

    all: Annotated[list[Gate], Field(min_length=1, max_length=MAX_GATES)] | None = Field(
        default=None, description="Every one must be open.")
    any: Annotated[list[Gate], Field(min_length=1, max_length=MAX_GATES)] | None = Field(
        default=None, description="One open gate is enough.")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.all is None) == (self.any is None):
            raise ValueError("give exactly one of all and any")
        return self

    @property
    def members(self) -> tuple[str, list[Gate]]:
        """("all" or "any", the gates)."""
        return ("all", self.all) if self.all is not None else ("any", self.any or [])


def _gate_form(value: Any) -> str:
    """Whether a gate is written as one or as several, so that errors are about the form that was meant."""
    if isinstance(value, Mapping):
        return "gates" if "all" in value or "any" in value else "gate"
    return "gates" if isinstance(value, Gates) else "gate"


AnyGate = Annotated[Annotated[Gate, Tag("gate")] | Annotated[Gates, Tag("gates")], Discriminator(_gate_form)]
