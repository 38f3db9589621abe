"""Reading activations without changing them: they become one number for each token, or one for a prompt."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from steering.artifacts.dictionary import Dictionary
from steering.artifacts.normality import NORMAL_FORMS, WINDOWED, normal_scores
from steering.artifacts.payload import Kind
from steering.artifacts.source import Source
from steering.artifacts.spline import Manifold
from steering.language.errors import ArtifactMismatch, InvalidSpec
from steering.language.layers import Layers
from steering.language.vocabulary import Form, Pooling, Site
from steering.models.facts import ModelFacts
from steering.programs.fits import check_width
from steering.programs.layers import layers_with_numbers

Tensors = Mapping[str, torch.Tensor]
# The first form is the one in which a kind is read where nothing else is said.
FORMS: Mapping[Kind, tuple[Form, ...]] = {
    "probe": ("linear",), "vector": ("linear", "cosine", "cast"), "sign_pattern": ("agreement",),
    "manifold": ("distance",), "sae": ("feature",),
    "normality": ("mahalanobis", "residual", "membership", "spectral", "diffusion")}
# Forms whose score of a mean is not the mean of scores.
NOT_LINEAR: tuple[Form, ...] = ("agreement", "distance", "feature", *NORMAL_FORMS)


@dataclass(frozen=True)
class Reader:
    """One artifact version ready to be read on the loaded model. `layers`: its numbers, by layer, in rising order.
    feature: which one is read, of an SAE."""

    ref: str
    site: Site
    form: Form
    layers: Mapping[int, Tensors]
    feature: int | None = None

    @property
    def windowed(self) -> bool:
        """Whether a token's score needs the tokens before it."""
        return self.form in WINDOWED

    def first_scored(self, layer: int) -> int:
        """Position of the first token that has a score, in a text that is read from its beginning."""
        return int(self.layers[layer]["window"]) if self.windowed else 0

    def recorded(self) -> float | None:
        """The threshold that the numbers hold for this form, of the first layer."""
        tensors = next(iter(self.layers.values()))
        return float(tensors["thresholds"][NORMAL_FORMS.index(self.form)]) if self.form in NORMAL_FORMS else None

    def scores(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """`[T]` float32 for the activations `h [T, width]` of one layer; NaN for tokens before `first_scored`."""
        tensors = self.layers[layer]
        if self.feature is not None:
            return Dictionary(tensors).feature(h, self.feature)
        if self.form == "distance":
            tensors = {**tensors, "sampled": self._sampled[layer]}
        return _SCORES[self.form](h.float(), tensors)

    @cached_property
    def _sampled(self) -> Mapping[int, torch.Tensor]:
        """Per layer the points of the manifold that distances are taken from: fitted once, and not per score."""
        shapes = {layer: Manifold.build(tensors["knots"], tensors["points"], tensors["period"])
                  for layer, tensors in self.layers.items()}
        return {layer: shape.at(shape.sample()) for layer, shape in shapes.items()}

    def pooled(self, layer: int, h: torch.Tensor, pool: Pooling) -> float:
        """One number for the activations `h [T, width]` of a prompt; see `spec.Reading`."""
        if pool == "last":
            return float(self.scores(layer, h[-1:]))
        rest = h[1:] if len(h) > 1 else h
        if pool == "max":
            return float(self.scores(layer, rest).max())
        if self.form in NOT_LINEAR:
            # These forms are not linear. The signs of a mean may be those of no token, and the mean of points on a ring
            # does not lie on the ring. So tokens are scored first, and the scores are averaged.
            return float(self.scores(layer, rest).mean())
        return float(self.scores(layer, rest.float().mean(dim=0, keepdim=True)))


def compile_reader(source: Source, facts: ModelFacts, *, form: Form | None = None, layers: Layers | None = None,
                   feature: int | None = None, any_model: bool = False, ref_param: str = "probe") -> Reader:
    """The reader of an artifact.

    Args:
        form, layers: what the request says; by default the artifact's own.
        feature: which one, of an SAE.
        any_model: read it although it was made on other weights.
        ref_param: field that names the artifact, for errors about it.

    Raises:
        ArtifactMismatch: made on another model, of another width, or of a kind that cannot be read.
        InvalidSpec: a form that the kind does not have, a layer without numbers, or a feature that is not there.
        LayerOutOfRange, UnsupportedSite: the model does not have the layer or site.
    """
    kind = source.payload.kind
    if kind not in FORMS:
        raise ArtifactMismatch(f"{source.ref} is a {kind}, which cannot be read", param=ref_param,
                               fix=f"Kinds that can: {', '.join(FORMS)}.")
    check_width(source, [source.site], facts, ref_param)
    if not any_model and source.fingerprint is not None and source.fingerprint != facts.fingerprint:
        raise ArtifactMismatch(
            f"{source.ref} was made on {source.model_id or 'another model'} (fingerprint {source.fingerprint[:12]}), "
            f"the loaded model is {facts.model_id} ({facts.fingerprint[:12]})", param=ref_param,
            fix="Make it anew on this model.")
    recorded = None if source.reading is None else source.reading.form
    chosen = form or recorded or FORMS[kind][0]
    if chosen not in FORMS[kind]:
        raise InvalidSpec(f"a {kind} is not read in the form {chosen}", param="form",
                          fix=f"Forms of a {kind}: {', '.join(FORMS[kind])}.")
    if (kind == "sae") != (feature is not None):
        raise InvalidSpec(f"{source.ref} is a {kind}, of which no feature is read" if feature is not None else
                          f"{source.ref} is an SAE, of which one feature is read at a time", param="feature",
                          fix='Leave it out.' if feature is not None else 'Name it: "feature": 712.')
    numbers: dict[int, Tensors] = {}
    for layer in sorted(layers_with_numbers(layers if layers is not None else source.layers, source.payload, facts)):
        facts.check_site(source.site, layer, "layers")
        numbers[layer] = source.payload.layers[layer]
        _check_width(source, numbers[layer], facts.width(source.site), ref_param)
        if feature is not None and feature >= (count := Dictionary(numbers[layer]).num_features):
            raise InvalidSpec(f"feature {feature} does not exist; {source.ref} has {count}", param="feature",
                              value=feature)
    return Reader(source.ref, source.site, chosen, numbers, feature)


def _check_width(source: Source, tensors: Tensors, width: int, param: str) -> None:
    for name in ("weight", "vector", "basis", "decoder"):
        if name in tensors and tensors[name].shape[-1] != width:
            raise ArtifactMismatch(f"{source.ref} has width {tensors[name].shape[-1]}, {source.site} of the loaded "
                                   f"model has width {width}", param=param)
    if "dims" in tensors and int(tensors["dims"].max()) >= width:
        raise ArtifactMismatch(f"{source.ref} names dim {int(tensors['dims'].max())}, {source.site} of the loaded "
                               f"model has width {width}", param=param)


def _linear(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    if "weight" in tensors:
        return h @ tensors["weight"] + tensors["bias"]
    return h @ tensors["vector"]


def _cosine(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(h, tensors["vector"].expand_as(h), dim=-1)


def _cast(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """cos(h, tanh(P h)) with P = c c^T / (c . c), as the code of CAST has it (Lee et al. 2024, arXiv 2409.05907).

    It is never negative, and equal for h and -h: it measures how much of h lies along c, and not on which side.
    """
    c = tensors["vector"]
    along = (h @ c).unsqueeze(-1) * (c / (c @ c))
    return torch.nn.functional.cosine_similarity(h, along.tanh(), dim=-1)


def _agreement(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    # Zero counts as negative, as it does where sign patterns are extracted.
    signs = torch.where(h[:, tensors["dims"]] > 0, 1, -1)
    return (signs == tensors["polarity"]).float().mean(dim=-1)


def _distance(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    within = (h - tensors["mean"]) @ tensors["basis"].T
    return torch.cdist(within.double(), tensors["sampled"]).min(dim=1).values.float()


_SCORES: Mapping[Form, Callable[[torch.Tensor, Tensors], torch.Tensor]] = {
    "linear": _linear, "cosine": _cosine, "cast": _cast, "agreement": _agreement, "distance": _distance,
    **{form: partial(normal_scores, form) for form in NORMAL_FORMS}}
