"""Features of a sparse autoencoder set, shifted and scaled, with what it cannot explain left as it is or dropped.

Replacing an activation by an edited reconstruction throws away the error of the reconstruction, which is often more
than the edit. The change of the features alone, decoded, is added instead: the same as the edited reconstruction plus
the error, exactly. Where it is asked what the model is worth without the error, the reconstruction takes the place of
the activation.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, StringConstraints, model_validator

from steering.artifacts.dictionary import Dictionary
from steering.artifacts.payload import INPUT_NORMS
from steering.language.fields import Finite, Model
from steering.ops.base import VECTOR_SITES, Operation, Options, Place, Row, Tensors, check_index

MAX_FEATURES = 64
FeatureIndex = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,7})$")]


class FeatureChange(Model):
    """What becomes of the value of a feature, which is 0 or more; exactly one field. It is in the units of the SAE's
    features, and may be below 0 afterwards, which takes the direction of the feature further away."""

    set: Finite | None = Field(default=None, description="The value becomes this on every touched token; 0 ablates it.")
    add: Finite | None = Field(default=None, description="This is added to the value.")
    scale: Finite | None = Field(default=None, description="The value is multiplied by this.")
    min: Finite | None = Field(default=None, description="The value is raised to at least this.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of set, add, scale and min")
        return self

    @property
    def numbers(self) -> tuple[float, float, float]:
        """factor, shift, low: the new value is max(factor * value + shift, low)."""
        if self.min is not None:
            return 1.0, 0.0, self.min
        if self.set is not None:
            return 0.0, self.set, -torch.inf
        if self.add is not None:
            return 1.0, self.add, -torch.inf
        return self.scale if self.scale is not None else 1.0, 0.0, -torch.inf


class SaeOptions(Options):
    features: dict[FeatureIndex, FeatureChange] = Field(
        default={}, max_length=MAX_FEATURES, description="By the index of the feature, what becomes of its value: "
        '{"712": {"set": 0}, "31": {"add": 4}, "8": {"scale": 0}}. Needed where the error is kept.')
    error: Literal["keep", "drop"] = Field(
        default="keep", description="What becomes of what the SAE cannot explain. Without it the reconstruction takes "
        "the place of the activation, also where no feature is changed.")

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.features and self.error == "keep":
            raise ValueError('give features that change, or "error": "drop"')
        return self

    @property
    def indices(self) -> torch.Tensor:
        return torch.tensor([int(index) for index in self.features], dtype=torch.int64)


class Sae(Operation):
    """h + scale * n(h) sum_i (f_i' - f_i) D_i, with the features f of h and the rows D of the decoder, over the changed
    features i alone; without the error h + scale * (r(f') - h), with the reconstruction r of features. n is the number
    that the SAE divides a token by; see `steering.artifacts.dictionary`."""

    name = "sae"
    options = SaeOptions
    kinds = ("sae",)
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: SaeOptions, place: Place) -> Row:
        dictionary, index = Dictionary(tensors), options.indices
        if len(index):
            check_index(index, dictionary.num_features, "feature", ("options", "features", str(int(index.max()))))
        if options.error == "drop":
            return _whole(tensors, dictionary, options, place)
        factor, shift, low = torch.tensor([change.numbers for change in options.features.values()]).T
        numbers = {"encoder": tensors["encoder"][index], "bias": tensors["encoder_bias"][index],
                   "decoder": tensors["decoder"][index], "factor": factor, "shift": shift, "low": low,
                   "amount": torch.tensor(place.scale), "norm": torch.zeros(dictionary.norm + 1)}
        if dictionary.k is not None:
            # Whether a feature is among the k largest depends on all of them.
            return Row("sae_topk", {**numbers, "all": tensors["encoder"], "all_bias": tensors["encoder_bias"],
                                    "k": torch.zeros(dictionary.k)})
        threshold = tensors["threshold"] if "threshold" in tensors else torch.zeros(dictionary.num_features)
        return Row("sae", {**numbers, "threshold": threshold[index]})

    def reference(self, h: torch.Tensor, tensors: Tensors, options: SaeOptions, place: Place) -> torch.Tensor:
        dictionary, out = Dictionary(tensors), []
        for token in h:
            features = dictionary.features(token[None])[0]
            edited = features.clone()
            for name, change in options.features.items():
                factor, shift, low = change.numbers
                edited[int(name)] = max(factor * float(features[int(name)]) + shift, low)
            size = 1.0
            if dictionary.norm == INPUT_NORMS["constant"]:
                size = float(token.norm()) / len(token) ** 0.5
            if dictionary.norm == INPUT_NORMS["layer"]:
                size = float(token.std())
            kept = token if options.error == "keep" else dictionary.reconstruction(token[None])[0]
            made = kept + size * (edited - features) @ tensors["decoder"]
            out.append(token + place.scale * (made - token))
        return torch.stack(out)


def _whole(tensors: Tensors, dictionary: Dictionary, options: SaeOptions, place: Place) -> Row:
    """All features, of which those that are not named keep their values."""
    count = dictionary.num_features
    changes = torch.tensor([1.0, 0.0, -torch.inf]).repeat(count, 1)
    for name, change in options.features.items():
        changes[int(name)] = torch.tensor(change.numbers)
    factor, shift, low = (column.contiguous() for column in changes.T)
    return Row("sae_whole", {
        "encoder": tensors["encoder"], "bias": tensors["encoder_bias"], "decoder": tensors["decoder"],
        "centre": tensors["decoder_bias"], "factor": factor, "shift": shift, "low": low,
        "threshold": tensors["threshold"] if "threshold" in tensors else torch.zeros(count),
        "amount": torch.tensor(place.scale), "norm": torch.zeros(dictionary.norm + 1),
        "k": torch.zeros((dictionary.k or 0) + 1)})


OPERATION = Sae()
