"""The options of every op."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from steering.language.fields import MAX_LIST, Finite, Fraction, Index, Label, Layer, Model, Switch
from steering.language.vocabulary import Op


class AddOptions(Model):
    norm_match: Switch = Field(default=False, description="Scale the vector to strength times the token's own norm.")
    preserve_norm: Switch = Field(default=False, description="Give every touched token its norm back after adding.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.norm_match and self.preserve_norm:
            raise ValueError("norm_match and preserve_norm exclude each other")
        return self


class AblateOptions(Model):
    multi_site: Switch = Field(default=False, description="Ablate at resid_pre, attn_out and mlp_out of every layer, "
                               "as the refusal-direction method does. Takes the direction of `source_layer`.")
    source_layer: Layer | None = Field(default=None, description="Whose direction to use at every layer.")

    @model_validator(mode="after")
    def _source_is_used(self) -> Self:
        if self.source_layer is not None and not self.multi_site:
            raise ValueError("source_layer has no effect without multi_site")
        return self


class ClampOptions(Model):
    """Coordinate along the unit direction, in activation units: set it to `value`, or keep it in [min, max]."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("value",), ("min", "max"))

    value: Finite | None = Field(default=None, description="Set the coordinate to this.")
    min: Finite | None = Field(default=None, description="Raise the coordinate to at least this.")
    max: Finite | None = Field(default=None, description="Lower the coordinate to at most this.")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if (self.value is None) == (self.min is None and self.max is None):
            raise ValueError("give either value, or min and/or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is larger than max")
        return self


class RotateOptions(Model):
    angle: Annotated[float, Field(strict=True, ge=-3600, le=3600)] = Field(
        description="Degrees, from the plane's first axis towards its second.")
    mode: Literal["to", "by"] = Field(default="to", description="to: set the in-plane angle; by: turn by the angle.")
    adaptive: Switch = Field(default=False, description="Only tokens with a positive coordinate on the first axis.")


class AffineOptions(Model):
    pass


class SignFlipOptions(Model):
    mode: Literal["away", "toward", "flip"] = Field(
        default="away", description="away: flip dims whose sign agrees with the pattern; toward: set the pattern's "
        "sign; flip: flip every listed dim.")
    fraction: Annotated[float, Field(strict=True, gt=0, le=1)] = Field(
        default=1.0, description="Share of the pattern's dims that is acted on, largest magnitude first, per token.")
    exclude: list[Index] = Field(default=[], max_length=MAX_LIST, description="Dims never touched.")


class ModeOptions(Model):
    """Options of which some belong to one mode: given with another they would be ignored, and are refused instead."""

    belongs_to: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @model_validator(mode="after")
    def _fits_mode(self) -> Self:
        mode = getattr(self, "mode")  # noqa: B009 - every subclass has one
        for name, modes in self.belongs_to.items():
            if name in self.model_fields_set and mode not in modes:
                raise ValueError(f"{name} has no effect in mode {mode}; it belongs to {', '.join(modes)}")
        return self


class MaskOptions(ModeOptions):
    belongs_to = {"scale": ("scale",)}

    mode: Literal["zero", "set", "scale"] = Field(
        default="zero", description="zero; set: to the artifact's values; scale: multiply by `scale`.")
    scale: Finite = Field(default=0.0, description="Factor for mode scale.")


class HeadMaskOptions(ModeOptions):
    belongs_to = {"scale": ("scale",)}

    mode: Literal["scale", "shift"] = Field(
        default="scale", description="scale: multiply the head's output by `scale`; shift: add strength times the "
        "artifact's shift.")
    scale: Finite = Field(default=0.0, description="Factor for mode scale; 0 switches the head off.")


class ExpertMaskOptions(ModeOptions):
    belongs_to = {"scale": ("scale",), "bias": ("bias",), "renormalise": ("off", "scale")}

    mode: Literal["off", "off_refill", "force", "scale", "bias"] = Field(
        default="off", description="off: weight 0, the slot stays empty; off_refill: never selected, the next best "
        "takes the slot; force: always selected; scale: weight times `scale`; bias: `bias` added to the router logit.")
    scale: float = Field(default=0.0, strict=True, ge=0, le=1000, description="Factor for mode scale.")
    bias: float = Field(default=0.0, strict=True, ge=-1e4, le=1e4, description="Logit bias for mode bias.")
    renormalise: Switch = Field(default=True,
                                description="Give the selected weights their former sum back (off, scale).")

    @model_validator(mode="after")
    def _bias_given(self) -> Self:
        if self.mode == "bias" and "bias" not in self.model_fields_set:
            raise ValueError("mode bias needs a bias")
        return self


Coordinate = Label | Finite | Annotated[list[Finite], Field(min_length=1, max_length=3)]


class ManifoldOptions(Model):
    """A label or a coordinate names a point. On a curve the coordinate is a place in the order of the labels, 1.5 being
    halfway between the second and the third; on a surface it is one number per axis."""

    target: Coordinate | None = Field(default=None, description="Where to: a label or a coordinate.")
    shift: Finite | Annotated[list[Finite], Field(min_length=1, max_length=3)] | None = Field(
        default=None, description="How far to go from where the token is: places on a curve, coordinates on a surface.")
    source: Coordinate | None = Field(
        default=None, description="Where the path to the target begins; left out: at the token's nearest point.")
    fraction: Fraction = Field(default=1.0, description="How much of the path to go.")
    path: Literal["manifold", "chord"] = Field(
        default="manifold", description="manifold: along it, the shorter way round; chord: straight, from the source, "
        "or from the token itself where no source is given.")
    keep_offset: Switch = Field(
        default=False, description="Move the token by the difference of the two points, so that it keeps its distance "
        "from the manifold; false: put it on the point. What is outside the subspace stays either way.")
    labels: list[Label] = Field(default=[], max_length=256, description="Names of the knots, in their order; a stored "
                                "manifold brings its own.")

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("target", "source"), ("shift",))

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.shift is not None and (self.target is not None or self.source is not None):
            raise ValueError("shift counts from where the token is; give it without target and source")
        if self.source is not None and self.target is None:
            raise ValueError("a source needs a target")
        if self.path == "chord" and self.shift is not None:
            raise ValueError("a shift goes along the manifold; give a target for a chord")
        if self.keep_offset and (self.source is not None or self.path == "chord"):
            raise ValueError("keep_offset needs the token's own place: leave source out, and path at manifold")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label occurs twice")
        return self


class PatchOptions(Model):
    basis_rank: int | None = Field(default=None, strict=True, ge=1, le=64,
                                   description="Use only the first rows of the basis.")


OPTIONS: dict[Op, type[Model]] = {
    "add": AddOptions, "ablate": AblateOptions, "clamp": ClampOptions, "rotate": RotateOptions,
    "affine": AffineOptions, "sign_flip": SignFlipOptions, "mask": MaskOptions, "neuron_mask": MaskOptions,
    "head_mask": HeadMaskOptions, "expert_mask": ExpertMaskOptions, "manifold": ManifoldOptions,
    "patch": PatchOptions,
}
