"""What a port found."""

from pydantic import BaseModel, Field

from steering.language.vocabulary import Site
from vectors.porting.aligned import Method


class Tried(BaseModel):
    """One layer of the target by one method."""

    layer: int = Field(description="Of the target.")
    method: Method
    explained: float = Field(description="Share of the target's variance that the map gives, on texts held out.")


class PortedLayer(BaseModel):
    """One layer of the artifact."""

    source_layer: int
    layer: int = Field(description="Of the target.")
    method: Method
    explained: float = Field(description="Share of the target's variance that the map gives, on texts held out.")
    shuffled: float = Field(description="The same of a map from tokens dealt to other tokens: what is to be had "
                            "without any correspondence.")
    coordinate: float = Field(description="Correlation, on texts held out, of the source's coordinate along the "
                              "direction with what is read for it in the target.")
    norm_ratio: float = Field(description="Mean norm of the target's activations over that of the source's, by which "
                              "directions were scaled.")
    tried: list[Tried]


class PortReport(BaseModel):
    artifact: str = Field(default="", description="What was stored, with version.")
    source: str = Field(description="Reference that was ported.")
    source_model: str | None
    source_fingerprint: str | None
    site: Site
    layers: list[PortedLayer]
    texts: int
    held_out_texts: int
    tokens: int
    left_out: int = Field(description="Tokens that were left out in both models: first ones, and those whose norm is "
                          "over 8 times the median.")
    warnings: list[str] = []
