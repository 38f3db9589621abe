"""One intervention: an op, the numbers it uses, where, how strongly and on which tokens."""

import hashlib
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_serializer,
    field_validator,
    model_validator,
)

from steering.language.fields import MAX_FLOAT, ArtifactRef, Finite, Index, Model
from steering.language.gates import AnyGate
from steering.language.layers import Layers
from steering.language.scope import Scope
from steering.language.strength import BareStrength, Dose, Strength
from steering.language.vocabulary import Op, Site


class Encoded(Model):
    """A tensor as base64 of little-endian numbers, the compact form for inline vectors."""

    base64: Annotated[str, Field(max_length=2**24)] = Field(description="Base64 of the raw bytes, C order.")
    dtype: Literal["float32", "float16", "int64", "int32"] = Field(default="float32", description="Number format.")
    shape: Annotated[list[Index], Field(max_length=3)] = Field(
        description="Length of each axis.")


class Intervention(Model):
    """One op with the numbers it uses, where, how strong and on which tokens.

    `{"artifact": NAME}` alone is valid: op, site, layers, strength and options then come from the artifact.
    """

    artifact: ArtifactRef | None = Field(default=None, description='Library name: "name", "name@3" or "name@alias".')
    inline: dict[Annotated[str, StringConstraints(max_length=32)], Any] | None = Field(
        default=None, description="The numbers themselves: tensor name to nested lists, to base64 (see Encoded), or to "
        'a map from layer to those; for example {"vector": {"3": [...]}}. Options of the op may stand here too.')
    op: Op | None = Field(default=None, description="What is done to the activation.")
    site: Site | None = Field(default=None, description="Where.")
    layers: Layers | None = Field(default=None, description="Which layers; negative numbers count from the end.")
    strength: Strength | None = Field(default=None, description="How strong; a bare number is in the artifact's unit.")
    scope: Scope = Field(default=Scope(), description="Which tokens.")
    gate: AnyGate | None = Field(default=None, description="Act only if this condition holds.")
    options: dict[Annotated[str, StringConstraints(max_length=32)], Any] = Field(
        default={}, description="Options of the op; see the table of options.")
    override: list[Literal["model", "site", "op"]] = Field(
        default=[], max_length=8, description="Use the artifact although it was made for another model, site or op.")

    @cached_property
    def digest(self) -> str:
        """sha256 of what is asked for. Inline numbers are megabytes: said once for an intervention that is kept."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @field_validator("strength", mode="before", json_schema_input_type=Strength | Dose | Finite | None)
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, dict) and "kl" in value:
            if "value" in value or "unit" in value:
                raise ValueError("give either kl, or value and unit")
            return {"unit": "kl", "value": value["kl"], **{k: v for k, v in value.items() if k != "kl"}}
        # A bare number keeps the unit open: the artifact's own unit applies, raw for inline numbers.
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not abs(value) <= MAX_FLOAT:
                raise ValueError("must be finite")
            return BareStrength(value=float(value))
        return value

    @field_serializer("strength", mode="wrap")
    def _stays_bare(self, value: Strength | None, plain: SerializerFunctionWrapHandler) -> Any:
        # Written with a unit it would mean something else when read back.
        return value.value if isinstance(value, BareStrength) else plain(value)

    @model_validator(mode="after")
    def _source(self) -> Self:
        if (self.artifact is None) == (self.inline is None):
            raise ValueError("give exactly one of artifact and inline")
        if self.inline is not None and self.op is None:
            raise ValueError("inline numbers need an op")
        return self
