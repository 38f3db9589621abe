"""How a request names layers."""

from typing import Annotated, Literal

from pydantic import Field

from steering.language.fields import Fraction, Layer, Model


class LayerRange(Model):
    """Layers `start <= layer < stop`, every `step`-th."""

    start: Layer = Field(default=0, description="First layer.")
    stop: Layer = Field(
        description="The first layer that is not taken; a negative number counts from the end of the model.")
    step: int = Field(default=1, strict=True, ge=1, le=4096, description="Distance between two layers that are taken.")


class LayerDepth(Model):
    """Layers by their share of the depth of the model. Layer l of L is taken if `from <= l / L < to`."""

    depth: tuple[Fraction, Fraction] = Field(
        description="Half-open window of depth, for example [0.25, 0.5].")


Layers = Literal["all"] | Annotated[list[Layer], Field(min_length=1, max_length=1024)] | LayerRange | LayerDepth
