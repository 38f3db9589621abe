"""Features of a sparse autoencoder set, shifted and scaled, with what it cannot explain left as it is.

Replacing an activation by an edited reconstruction would throw away the error of the reconstruction, which is often
more than the edit. The change of the features alone, decoded, is added instead: the same as the edited reconstruction
plus the error, exactly.
"""

from typing import Annotated, Self

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
        min_length=1, max_length=MAX_FEATURES, description="By the index of the feature, what becomes of its value: "
        '{"712": {"set": 0}, "31": {"add": 4}, "8": {"scale": 0}}.')

    @property
    def indices(self) -> torch.Tensor:
        return torch.tensor([int(index) for index in self.features])


class Sae(Operation):
    """h + scale * n(h) sum_i (f_i' - f_i) D_i, with the features f of h and the rows D of the decoder, over the changed
    features i alone. n is the number that the SAE divides a token by; see `steering.artifacts.dictionary`."""

    name = "sae"
    options = SaeOptions
    kinds = ("sae",)
    sites = VECTOR_SITES

    def row(self, tensors: Tensors, options: SaeOptions, place: Place) -> Row:
        dictionary, index = Dictionary(tensors), options.indices
        check_index(index, dictionary.num_features, "feature", ("options", "features", str(int(index.max()))))
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
            out.append(token + place.scale * size * (edited - features) @ tensors["decoder"])
        return torch.stack(out)


OPERATION = Sae()
