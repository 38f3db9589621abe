"""How strongly an intervention acts."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, WrapSerializer

from steering.language.fields import MAX_FLOAT, Finite, Model
from steering.language.vocabulary import Unit


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


class BareStrength(Strength):
    """A strength written as a bare number."""


def _short_forms(value: Any) -> Any:
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


def _stays_bare(value: Strength | None, plain: SerializerFunctionWrapHandler) -> Any:
    # Written with a unit it would mean something else when read back.
    return value.value if isinstance(value, BareStrength) else plain(value)


# A strength in any of its forms: with its unit, as a dose, or as a bare number.
GivenStrength = Annotated[Strength | None,
                          BeforeValidator(_short_forms, json_schema_input_type=Strength | Dose | Finite | None),
                          WrapSerializer(_stays_bare)]
