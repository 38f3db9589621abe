"""The language: pydantic models of what a request may say in its `steering` field. This is the wire format.

Every model forbids unknown fields, so a misspelt field is an error and never a silent no-op. `docs/spec.md` is
generated from these models.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    field_serializer,
    field_validator,
    model_validator,
)

Op = Literal["add", "ablate", "clamp", "rotate", "affine", "sign_flip", "mask", "neuron_mask", "head_mask",
             "expert_mask", "manifold", "patch"]
Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "head_out", "mlp_act", "router"]
Unit = Literal["raw", "unit", "rel", "sigma", "kl"]
Form = Literal["linear", "cosine", "cast", "agreement", "distance"]
Pool = Literal["mean", "max", "last"]
Direction = Literal["above", "below"]
OPS: tuple[Op, ...] = get_args(Op)
SITES: tuple[Site, ...] = get_args(Site)

MAX_INTERVENTIONS = 32
MAX_GATES = 8
MAX_MONITORS = 16
MAX_LIST = 4096
MAX_FLOAT = 3.4e38  # of float32, in which everything is computed
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
REF_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}(@([0-9]{1,9}|[a-z][a-z0-9._-]{0,31}))?$"

ArtifactRef = Annotated[str, StringConstraints(pattern=REF_PATTERN)]
# Numbers are strict: neither "1" nor true is a 1, so what the models take is what the JSON schema says.
Finite = Annotated[float, Field(strict=True, ge=-MAX_FLOAT, le=MAX_FLOAT)]
Layer = Annotated[int, Field(strict=True, ge=-512, le=4096)]
Index = Annotated[int, Field(strict=True, ge=0, le=2**24)]
Position = Annotated[int, Field(strict=True, ge=-(2**24), le=2**24)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Switch = Annotated[bool, Field(strict=True)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # Groups of fields that exclude each other: of a stored default, those drop out that a request chose against.
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()


class Strength(Model):
    """How strong, and in which unit.

    raw: the stored numbers times `value`. unit: the direction scaled to length `value`. rel: to length `value` times
    the mean residual norm that the artifact records for the layer. sigma: to length `value` times the standard
    deviation of the projection on the direction that the artifact records. kl: as strong as moves the next-token
    distribution by `value` nats per generated token, by the artifact's calibration.
    """

    value: Finite = Field(description="Multiplier or dose; 0 does nothing, a negative number steers the other way.")
    unit: Unit = Field(default="raw", description="Unit of `value`: raw, unit, rel, sigma or kl.")


class Dose(Model):
    """A strength as the effect it is to have: short for `{"value": ..., "unit": "kl"}`."""

    kl: Finite = Field(description="Nats per generated token; a negative number steers the other way.")


class LayerRange(Model):
    """Layers `start <= layer < stop`, every `step`-th."""

    start: Layer = Field(default=0, description="First layer.")
    stop: Layer = Field(description="Layer behind the last; negative counts from the end of the model.")
    step: int = Field(default=1, strict=True, ge=1, le=4096, description="Distance of two layers.")


class LayerDepth(Model):
    """Layers by fraction of depth: layer l of L is taken if `from <= l / L < to`."""

    depth: tuple[Fraction, Fraction] = Field(
        description="Half-open window of depth, for example [0.25, 0.5].")


Layers = Literal["all"] | Annotated[list[Layer], Field(min_length=1, max_length=1024)] | LayerRange | LayerDepth


class _Select(Model):
    """Tokens, as the union of what its fields name."""

    token_ids: list[Index] | None = Field(default=None, min_length=1, max_length=MAX_LIST,
                                          description="Tokens with one of these ids.")


class PromptPick(_Select):
    """Prompt tokens: the union of positions, windows, token ids and roles."""

    positions: list[Position] | None = Field(default=None, min_length=1, max_length=MAX_LIST,
                                 description="Positions from the prompt's start; negative ones from its end.")
    windows: list[tuple[Position | None, Position | None]] | None = Field(
        default=None, min_length=1, max_length=MAX_LIST,
        description="Half-open windows [start, stop); negative from the prompt's end, null for open.")
    roles: list[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")]] | None = Field(
        default=None, min_length=1, max_length=16,
        description="Chat turns of these roles, markers included (system, user, ...).")


class PromptSelection(PromptPick):
    """Prompt tokens picked by its fields (all, if none is given), less those that `exclude` picks."""

    exclude: PromptPick | None = Field(default=None, description="Tokens to leave alone whatever else picks them.")


class GenerationPick(_Select):
    """Generated tokens: the union of positions, windows and token ids. Position 0 is the first generated token."""

    positions: list[Index] | None = Field(default=None, min_length=1, max_length=MAX_LIST,
                                   description="Positions from the first generated token (0).")
    windows: list[tuple[Index | None, Index | None]] | None = Field(
        default=None, min_length=1, max_length=MAX_LIST, description="Half-open windows [start, stop); null for open.")


class GenerationSelection(GenerationPick):
    """Generated tokens picked by its fields (all, if none is given), less those that `exclude` picks."""

    exclude: GenerationPick | None = Field(default=None, description="Tokens to leave alone whatever else picks them.")


class Scope(Model):
    """Which tokens an intervention touches.

    A generated token is touched when it is fed back: the first generated token is *predicted* by the last prompt
    token, so "steer every prediction" is `{"prompt": {"positions": [-1]}, "generation": "all"}`.
    """

    prompt: Literal["all", "none"] | PromptSelection = Field(default="all", description="Prompt tokens.")
    generation: Literal["all", "none"] | GenerationSelection = Field(default="all", description="Generated tokens.")

    @model_validator(mode="after")
    def _touches_something(self) -> Self:
        if self.prompt == "none" and self.generation == "none":
            raise ValueError("the scope touches no token; leave the intervention out instead")
        return self


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


Label = Annotated[str, StringConstraints(min_length=1, max_length=256)]
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


class Encoded(Model):
    """A tensor as base64 of little-endian numbers, the compact form for inline vectors."""

    base64: Annotated[str, Field(max_length=2**24)] = Field(description="Base64 of the raw bytes, C order.")
    dtype: Literal["float32", "float16", "int64", "int32"] = Field(default="float32", description="Number format.")
    shape: Annotated[list[Index], Field(max_length=3)] = Field(
        description="Length of each axis.")


class Reading(Model):
    """How an artifact is read: activations of its site and layers become one number a token, and of a prompt one.

    linear: weight . h + bias of a probe, h . v of a vector. cosine: of h and the vector. cast: cos(h, tanh(P h)) with
    P the projection on the vector, which says how much of h lies along it and nothing of the side. agreement: share of
    a sign pattern's dims that have its sign. distance: from the nearest sampled point of a manifold, in its subspace.

    mean: of the prompt's activations, read once (agreement, distance: of the tokens' scores); max: of the tokens'
    scores; both leave out the first token, which many models use as a sink, where there are others. last: the last
    prompt token's.
    """

    form: Form = Field(default="linear", description="linear, cosine, cast, agreement or distance.")
    pool: Pool = Field(default="mean", description="How a prompt's tokens become one number.")
    threshold: Finite | None = Field(default=None, description="The score that parts the two classes.")
    direction: Direction = Field(default="above", description="The side of the threshold on which the concept lies.")


class Gate(Model):
    """A condition under which an intervention acts: the score of an artifact that can be read, and a threshold.

    What is not given comes from the artifact's own reading. Of several layers one on the right side is enough.
    """

    probe: ArtifactRef = Field(description="A probe, vector, sign pattern or manifold of the library.")
    threshold: Finite | None = Field(default=None, description="Score to compare with.")
    direction: Direction | None = Field(default=None, description="Open when the score is above or below it.")
    form: Form | None = Field(default=None, description="linear, cosine, cast, agreement or distance; see Reading.")
    pool: Pool | None = Field(default=None, description="mean, max or last token of the prompt; see Reading.")
    layers: Layers | None = Field(default=None, description="Layers to read.")
    when: Literal["prompt", "token"] = Field(
        default="prompt", description="prompt: decided once per prompt, by the untouched model, for the whole "
        "completion. token: for each token, from what acts on it at the same site and layer.")
    override: list[Literal["model"]] = Field(
        default=[], max_length=8, description="Use the probe although it was made for another model.")


class Gates(Model):
    """Several gates as one: open if all of them, or any of them, are."""

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
    """Which of the two a gate is written as, so that errors are about that one."""
    if isinstance(value, Mapping):
        return "gates" if "all" in value or "any" in value else "gate"
    return "gates" if isinstance(value, Gates) else "gate"


AnyGate = Annotated[Annotated[Gate, Tag("gate")] | Annotated[Gates, Tag("gates")], Discriminator(_gate_form)]


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


class BareStrength(Strength):
    """A strength written as a bare number."""


class Guard(Model):
    """A limit on what a spec may do to a completion, checked while it is generated.

    Every `every` tokens the effect of the tokens since the last check is measured. Over a limit, the intervention with
    the largest share of it is lowered to half of its strength, or stopped; one that was lowered three times is stopped.
    What cannot be measured counts as over the limit and stops everything.
    """

    max_kl: Annotated[float, Field(strict=True, gt=0, le=1e6)] | None = Field(
        default=None, description="Most KL(steered || untouched), in nats per token, mean over the tokens of a check.")
    max_repetition: Fraction | None = Field(
        default=None, description="Largest share of a check's 3-grams of tokens that occurred before in the "
        "completion.")
    action: Literal["lower", "stop"] = Field(default="lower", description="What is done to the intervention.")
    every: int = Field(default=16, strict=True, ge=4, le=1024, description="Tokens between two checks.")

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.max_kl is None and self.max_repetition is None:
            raise ValueError("give max_kl, max_repetition or both")
        return self


class Spec(Model):
    """An ordered list of interventions. Order is meaning: each acts on what the one before left."""

    interventions: list[Intervention] = Field(max_length=MAX_INTERVENTIONS, description="In order of action.")
    guard: Guard | None = Field(default=None, description="Limits that hold while a completion is generated.")


class Steering(Model):
    """The `steering` field of a request."""

    interventions: list[Intervention] = Field(default=[], max_length=MAX_INTERVENTIONS,
                                              description="In order of action.")
    preset: ArtifactRef | None = Field(default=None, description="A stored spec that acts before `interventions`.")
    default: Literal["inherit", "none", "override"] = Field(
        default="inherit", description="The server's default spec: inherit: it acts first; override: this spec stands "
        "in its place; none: no steering at all.")
    report: Literal["none", "summary", "tokens"] = Field(
        default="none", description="summary: measured effect totals with the receipt; tokens: per generated token.")

    guard: Guard | None = Field(default=None, description="Limits that hold while a completion is generated, beside "
                                "those of the preset and the default spec.")
    monitor: list[ArtifactRef] = Field(
        default=[], max_length=MAX_MONITORS, description="Probes, vectors, sign patterns or manifolds to read at every "
        "token, without changing anything; see Reading.")

    @model_validator(mode="after")
    def _tri_state(self) -> Self:
        given = bool(self.interventions) or self.preset is not None
        if self.default == "none" and given:
            raise ValueError('default "none" means no steering at all; use "override" to steer with this spec only')
        if self.default == "override" and not given:
            raise ValueError('default "override" needs interventions or a preset; use "none" to switch steering off')
        return self
