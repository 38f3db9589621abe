"""Limits that hold while a completion is generated."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from steering.language.fields import MAX_GUARD_MONITORS, Fraction, Model
from steering.language.watch import MonitorLimit


class Guard(Model):
    """A limit on what a spec may do to a completion, checked while it is generated.

    Every `every` tokens the effect of the tokens since the last check is measured. Over a limit, the intervention with
    the largest share of it is lowered to half of its strength, or stopped; one that was lowered three times is stopped.
    What cannot be measured counts as over the limit and stops everything.
    """

    max_kl: Annotated[float, Field(strict=True, gt=0, le=1e6)] | None = Field(
        default=None, description="Largest KL(steered || untouched) that is allowed, in nats per token, as the mean "
        "over the tokens of a check.")
    max_repetition: Fraction | None = Field(
        default=None, description="Largest share that is allowed of a check's 3-grams of tokens which occurred "
        "before in the completion.")
    monitor: list[MonitorLimit] = Field(
        default=[], max_length=MAX_GUARD_MONITORS, description="Limits on what monitors read of the tokens of a check. "
        "Each check then takes one more pass.")
    action: Literal["lower", "stop"] = Field(default="lower", description="What is done to the intervention.")
    every: int = Field(default=16, strict=True, ge=4, le=1024, description="Tokens between two checks.")

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.max_kl is None and self.max_repetition is None and not self.monitor:
            raise ValueError("give max_kl, max_repetition or monitor")
        return self
