"""What a calibration takes."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator

from steering.language.fields import Layer, Model
from steering.language.scope import Scope
from vectors.calibrate.scorer import Scorer
from vectors.extract.subject import Prompt

MIN_PROMPTS = 8
Prompts = Annotated[list[Prompt], Field(min_length=MIN_PROMPTS, max_length=4096)]
LayerSet = Annotated[list[Layer], Field(min_length=1, max_length=512)]
Size = Annotated[float, Field(strict=True, gt=0, le=1e6)]


class Target(Model):
    """Prompts of the behaviour that the artifact is for, and how it is scored."""

    prompts: Prompts
    scorer: Scorer


class CalibrateOptions(Model):
    """How to calibrate one version of an artifact."""

    prompts: Prompts = Field(description="Neutral prompts, as they come in use: text, conversations or token ids.")
    target: Target | None = Field(default=None, description="Also score the wanted behaviour at every strength.")
    layers: list[LayerSet] = Field(default=[], max_length=64, description="Settings to calibrate, each a list of "
                                   "layers; empty: the artifact's own layers only. The first one gets the placebo "
                                   "floor.")
    scope: Scope = Field(default=Scope(), description="Tokens that are touched; a dose holds for this scope.")
    options: dict[Annotated[str, StringConstraints(max_length=32)], Any] = Field(
        default={}, description="Options of the op, on top of the artifact's own.")
    strengths: Annotated[list[Size], Field(max_length=64)] = Field(
        default=[], description="Raw strengths to measure, signs left out; empty: those between which `reach` lies are "
        "found.")
    reach: tuple[Size, Size] = Field(default=(0.02, 2.0), description="Doses, in nats, that the curve should cover.")
    extend: bool = Field(default=False, strict=True, description="Keep the curve that the artifact has in the setting, "
                         "and measure only what `reach` lies beyond it.")
    precision: float = Field(default=0.05, strict=True, ge=0, le=1, description="Relative standard error of KL at "
                             "which a strength needs no more of the prompts. With a target all of them are used.")
    points: int = Field(default=5, strict=True, ge=3, le=64, description="Strengths of each sign.")
    draws: int = Field(default=20, strict=True, ge=1, le=200, description="Random artifacts of the placebo floor.")
    max_tokens: int = Field(default=24, strict=True, ge=1, le=1024, description="Tokens of a completion.")
    temperature: float = Field(default=1.0, strict=True, gt=0, le=2, description="Of the completions.")
    seed: int = Field(default=0, strict=True, ge=0, le=2**32 - 1, description="Seed of completions and draws.")

    @model_validator(mode="after")
    def _orders(self) -> "CalibrateOptions":
        if self.reach[0] >= self.reach[1]:
            raise ValueError("reach is a smaller and a larger dose")
        if self.strengths and (len(self.strengths) < 2 or sorted(set(self.strengths)) != self.strengths):
            raise ValueError("strengths must be two or more, rising")
        return self
