"""What an artifact is: its metadata and its version."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from steering.artifacts.payload import READ_ONLY, Kind, Payload
from steering.artifacts.source import Source
from steering.language.errors import InvalidPayload
from steering.language.fields import LONGEST_NAME, NAME_PATTERN, Model
from steering.language.gates import Reading
from steering.language.layers import Layers
from steering.language.scope import Scope
from steering.language.strength import Strength
from steering.language.vocabulary import Op, Site
from steering.ops import get_operation, operations
from steering.ops.base import VECTOR_SITES
from steering.programs.reading import FORMS
from vectors.calibration import calibration_of


class InvalidMetadata(InvalidPayload):
    """What is recorded about an artifact cannot be used: a wrong field, or one that contradicts the numbers."""

    code = "invalid_metadata"

    @classmethod
    def of(cls, error: ValidationError, prefix: str) -> "InvalidMetadata":
        """The first complaint of pydantic, with its field named."""
        first = error.errors(include_url=False, include_input=False)[0]
        return cls(first["msg"].removeprefix("Value error, "), param=(prefix, *first["loc"]))


@dataclass(frozen=True)
class Limits:
    """Sizes beyond which an artifact is refused with `PayloadTooLarge`, and those beyond which the whole library takes
    no more (`LibraryFull`; None: no limit)."""

    payload_bytes: int = 256 * 2**20
    document_bytes: int = 256 * 2**10
    layers: int = 512
    library_bytes: int | None = None
    library_names: int | None = None
    library_versions: int | None = None


def _printable(text: str) -> str:
    if not text.isprintable() and any(not (c.isprintable() or c in "\n\t") for c in text):
        raise ValueError("contains control characters or half a surrogate pair")
    return text


def ops_of_kind(kind: Kind) -> tuple[Op, ...]:
    """The ops that take artifacts of this kind."""
    return tuple(operation.name for operation in operations() if kind in operation.kinds)


Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=LONGEST_NAME)]
Tag = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")]
Tags = Annotated[tuple[Tag, ...], Field(max_length=32)]
Line = Annotated[str, StringConstraints(max_length=256), AfterValidator(_printable)]
Text = Annotated[str, StringConstraints(max_length=8192), AfterValidator(_printable)]
LayerNumber = Annotated[int, Field(ge=0, le=999_999)]
PerLayer = dict[LayerNumber, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
Free = dict[str, JsonValue]


def _readable_card(card: Free | None) -> Free | None:
    try:
        calibration_of(card)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in ("calibration", *first["loc"]))
        raise ValueError(f"{field}: {first['msg'].removeprefix('Value error, ')}; write it with trimtab calibrate"
                         ) from error
    return card


Card = Annotated[Free | None, AfterValidator(_readable_card)]


def warnings_of(card: Free | None) -> tuple[str, ...]:
    """What whoever applies the artifact should know: what the card's `warnings` say, in sentences."""
    found = None if card is None else card.get("warnings")
    return tuple(str(one) for one in found) if isinstance(found, list) else ()


def card_digest(card: Free) -> str:
    """Tells one state of a card from another."""
    return hashlib.sha256(json.dumps(card, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


class Metadata(Model):
    """What the maker of an artifact records about it. Immutable but for description, tags and card (see `Patch`)."""

    name: Name = Field(description="Lower case letters, digits, dot, underscore, hyphen; at most 64. Before a slash: "
                      "the tenant that it belongs to, or shared.")
    kind: Kind = Field(description="What the numbers are.")
    op: Op | None = Field(default=None, description="What it is meant for: the op of a spec that names only the "
                          "artifact. Every kind needs one that is not only read.")
    site: Site = Field(description="Where the numbers were taken, and where they are applied.")
    layers: Layers | None = Field(default=None, description="Default layers; none: all layers that have numbers.")
    strength: Strength = Field(default=Strength(value=1.0), description="Default strength.")
    options: Free = Field(default={}, description="Default options of the op. Empty, though the op needs some: the "
                          "request must give them.")
    sign_convention: Text = Field(default="", description="What a positive strength means.")
    description: Text = Field(default="", description="What it does, for people.")
    tags: Tags = Field(default=(), description="Labels to filter by.")
    model_id: Line | None = Field(default=None, description="Model it was made on; none: unknown, fits any.")
    fingerprint: Line | None = Field(default=None, description="Hash of that model's configuration and weights.")
    d_model: int | None = Field(default=None, ge=1, le=2**24, description="Residual width of that model.")
    residual_norm: PerLayer = Field(default={}, description="Mean norm of the activation at the site, per layer.")
    sigma: PerLayer = Field(default={}, description="Standard deviation of the projection on the direction, per layer.")
    reading: Reading | None = Field(default=None, description="How it is read by gates and monitors, for artifacts "
                                    "made for that: form, pooling, threshold.")
    scope: Scope | None = Field(default=None, description="Tokens it acts on where a spec does not say; none: all.")
    provenance: Free = Field(default={}, description="How it was made: method, data_hash, created_by, source_file, "
                             "report, and what else is worth knowing.")
    card: Card = Field(default=None, description="Measured scores; `calibration` holds the curves that doses are read "
                       "from.")

    @field_validator("options")
    @classmethod
    def _known_options(cls, options: Free, info: ValidationInfo) -> Free:
        if options and info.data.get("op") is not None:
            get_operation(info.data["op"]).options.model_validate(options)
        return options

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.reading is not None and self.reading.form not in FORMS.get(self.kind, ()):
            raise ValueError(f"a {self.kind} is not read in the form {self.reading.form}")
        if len(set(self.tags)) != len(self.tags):
            raise ValueError("a tag occurs twice in tags")
        if self.op is None or self.kind in READ_ONLY:
            return self._only_read()
        operation = get_operation(self.op)
        if self.kind not in operation.kinds:
            raise ValueError(f"a {self.kind} cannot be used with the op {self.op}; use "
                             f"{' or '.join(ops_of_kind(self.kind))}")
        if self.site not in operation.sites:
            raise ValueError(f"the op {self.op} does not act at {self.site}; use {' or '.join(operation.sites)}")
        if self.strength.unit == "kl":
            raise ValueError("a dose cannot be the default strength: the calibration it is read from may change; give "
                             "raw, and the dose in a preset")
        if self.strength.unit != "raw" and not operation.adds_direction:
            raise ValueError(f"strength unit {self.strength.unit} has no meaning for the op {self.op}; use raw")
        return self

    def _only_read(self) -> Self:
        if self.kind not in READ_ONLY:
            raise ValueError(f"a {self.kind} needs an op: {' or '.join(ops_of_kind(self.kind))}")
        if self.op is not None or self.options or self.strength != Strength(value=1.0):
            raise ValueError(f"a {self.kind} is read and never applied, so it has neither op nor options nor strength")
        if self.site not in VECTOR_SITES:
            raise ValueError(f"a {self.kind} is not read at {self.site}; use {' or '.join(VECTOR_SITES)}")
        return self

    @classmethod
    def parse(cls, fields: Mapping[str, Any], prefix: str = "metadata") -> "Metadata":
        """Metadata from plain data.

        Raises:
            InvalidMetadata: naming the field under `prefix`.
        """
        try:
            metadata = cls.model_validate(dict(fields))
            metadata.document()
        except ValidationError as error:
            raise InvalidMetadata.of(error, prefix) from error
        return metadata

    def document(self) -> str:
        """The metadata as JSON, byte for byte the same for equal metadata.

        Raises:
            InvalidMetadata: a string holds half a surrogate pair, which no JSON in UTF-8 can.
        """
        try:
            return self.model_dump_json()
        except PydanticSerializationError as error:
            raise InvalidMetadata("contains text that is not valid Unicode", param="metadata") from error


class Patch(Model):
    """New values of the descriptive fields of one version. What is not given stays."""

    description: Text | None = Field(default=None, description="Null or absent: unchanged.")
    tags: Tags | None = Field(default=None, description="The whole new list; null or absent: unchanged.")
    card: Card = Field(default=None, description="The whole new card; null: removed; absent: unchanged.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Null is kept, because a card that is null is to be removed."""
        return given


@dataclass(frozen=True)
class Artifact:
    """One version of an artifact, without its numbers.

    Attributes:
        digest: sha256 of the canonical safetensors bytes of the numbers, under which the blob is stored.
        nbytes: length of those bytes.
        layers: layers that have numbers.
        aliases: aliases that point at this version as it was read.
    """

    metadata: Metadata
    version: int
    digest: str
    nbytes: int
    layers: tuple[int, ...]
    aliases: tuple[str, ...]
    created_at: datetime

    @property
    def ref(self) -> str:
        return f"{self.metadata.name}@{self.version}"

    def to_source(self, payload: Payload) -> Source:
        """The form the compiler takes. `payload`: the numbers of this version (`Library.payload`)."""
        m = self.metadata
        calibration = calibration_of(m.card)
        return Source(ref=self.ref, digest=self.digest, payload=payload, op=m.op, site=m.site, model_id=m.model_id,
                      fingerprint=m.fingerprint, layers=m.layers, strength=m.strength, options=m.options,
                      residual_norm=m.residual_norm, sigma=m.sigma, reading=m.reading, scope=m.scope,
                      warnings=warnings_of(m.card),
                      calibrated=() if calibration is None else tuple(s.calibrated() for s in calibration.settings),
                      card=None if m.card is None else card_digest(m.card))
