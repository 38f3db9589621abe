"""One intervention: an op, the numbers it uses, where, how strongly and on which tokens."""

import hashlib
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from steering.language.fields import ArtifactRef, Index, Model
from steering.language.gates import AnyGate
from steering.language.layers import Layers
from steering.language.scope import Scope
from steering.language.strength import GivenStrength
from steering.language.vocabulary import Op, Site


class Encoded(Model):
    """A tensor as base64 of little-endian numbers, the compact form for inline vectors."""

    base64: Annotated[str, Field(max_length=2**24)] = Field(description="Base64 of the raw bytes, C order.")
    dtype: Literal["float32", "float16", "int64", "int32"] = Field(default="float32", description="Number format.")
    shape: Annotated[list[Index], Field(max_length=3)] = Field(
        description="Length of each axis.")


class Intervention(Model):
    """One op with the numbers it uses, where, how strong and on which tokens.

    `{"artifact": NAME}` alone is valid: op, site, layers, strength and options then come from the artifact. A patch
    whose options name captured activations needs neither artifact nor inline; one that is given says the directions.
    Nor does sparsify need one, with a method that looks at nothing but the token and the model's weights.
    """

    artifact: ArtifactRef | None = Field(default=None, description='Library name: "name", "name@3" or "name@alias".')
    inline: dict[Annotated[str, StringConstraints(max_length=32)], Any] | None = Field(
        default=None, description="The numbers themselves: tensor name to nested lists, to base64 (see Encoded), or to "
        'a map from layer to those; for example {"vector": {"3": [...]}}. Options of the op may stand here too.')
    op: Op | None = Field(default=None, description="What is done to the activation.")
    site: Site | None = Field(default=None, description="Where.")
    layers: Layers | None = Field(default=None, description="Which layers; negative numbers count from the end.")
    strength: GivenStrength = Field(default=None, description="How strong; a bare number is in the artifact's unit.")
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

    @property
    def captured(self) -> Any:
        """The captured activations from which a patch takes its numbers, None where it takes them from elsewhere."""
        return self.options.get("source") if self.op == "patch" else None

    @model_validator(mode="after")
    def _source(self) -> Self:
        given = (self.artifact is not None) + (self.inline is not None)
        if given == 2 or (given == 0 and self.captured is None and self.op != "sparsify"):
            raise ValueError("give exactly one of artifact and inline")
        if self.inline is not None and self.op is None:
            raise ValueError("inline numbers need an op")
        return self
