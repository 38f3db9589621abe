"""What is said of an SAE's file beside it: the field `sae` of the metadata that goes with an import."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StringConstraints, ValidationError

from steering.language.errors import InvalidRequest
from steering.language.fields import Model
from vectors.artifact import InvalidMetadata

FIELD = "sae"
Positive = Annotated[float, Field(strict=True, gt=0, le=1e30)]
CheckedText = Annotated[str, StringConstraints(min_length=1, max_length=8192)]


class SaeFields(Model):
    """Conventions of an SAE's file. What is given wins over the file and the JSON beside it."""

    config: dict[str, JsonValue] = Field(default={}, description="The JSON that stands beside the file: cfg.json, "
                                         "config.json or hyperparams.json.")
    subtract_decoder_bias: bool | None = Field(default=None, strict=True, description="Whether the decoder's bias is "
                                               "taken from the activation before it is encoded.")
    scale: Positive | None = Field(default=None, description="What every activation is multiplied by before it is "
                                   "encoded, and divided by after it is decoded.")
    input_norm: Literal["none", "constant", "layer"] | None = Field(
        default=None, description="What each token is divided by besides: nothing, its norm over the root of the "
        "width, or its standard deviation after its mean is taken away.")
    activation: Literal["relu", "topk", "jumprelu"] | None = Field(
        default=None, description="jumprelu: above a threshold of each feature.")
    k: int | None = Field(default=None, strict=True, ge=1, le=2**24, description="Features that are kept, of topk.")
    threshold: float | None = Field(default=None, strict=True, ge=-1e30, le=1e30,
                                    description="One threshold for all features.")
    texts: Annotated[list[CheckedText], Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Texts like those it was trained on, for the check on import; without them the "
        "server's own.")
    least_explained: Annotated[float, Field(strict=True, ge=0, le=1)] = Field(
        default=0.5, description="Share of the variance of those texts that it must explain at least.")


def split(fields: Mapping[str, Any]) -> tuple[SaeFields, dict[str, Any]]:
    """What `fields` of an import say of an SAE, and the other ones.

    Raises:
        InvalidMetadata: naming the field.
    """
    rest = dict(fields)
    said = rest.pop(FIELD, None)
    try:
        return SaeFields.model_validate({} if said is None else said), rest
    except ValidationError as error:
        raise InvalidMetadata.of(error, FIELD).at("metadata") from error


def layer_said(fields: Mapping[str, Any]) -> int | None:
    """The one layer that the metadata of an import names.

    Raises:
        InvalidRequest: it names several.
    """
    layers = fields.get("layers")
    if layers is None:
        return None
    if not isinstance(layers, list) or len(layers) != 1 or not isinstance(layers[0], int) or layers[0] < 0:
        raise InvalidRequest("the file of an SAE holds one layer", param=("metadata", "layers"),
                             fix='Give it as "layers": [12], counted from 0.')
    return layers[0]
