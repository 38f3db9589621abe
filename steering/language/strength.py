"""How strongly an intervention acts."""


from pydantic import Field

from steering.language.fields import Finite, Model
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
