"""What a calibration leaves in an artifact's card, under the key `calibration`: one entry a setting."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from steering.artifacts.dose import Calibrated, Curve, canonical, canonical_scope
from steering.language.fields import Model
from steering.language.scope import Scope
from steering.language.vocabulary import Op, Site

KEY = "calibration"
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Outcome(Model):
    """Means over completions. Of completions at one strength, or (strength 0) of the untouched model."""

    strength: Amount = Field(description="Raw, without its sign.")
    kl: Amount = Field(description="KL(steered || untouched), nats per generated token.")
    kl_error: Amount = Field(description="Standard error of `kl` over completions.")
    perplexity: Positive = Field(description="Of the completions under the untouched model.")
    repetition: Amount = Field(description="Share of repeated 3-grams.")
    compression: Amount = Field(description="Bytes of text over compressed bytes.")
    length: Amount = Field(description="Tokens.")
    ended: Amount = Field(description="Share of completions that the model ended itself.")
    target: float | None = Field(default=None, description="Target score, where a target was given.")
    completions: int | None = Field(default=None, description="Behind these figures; null for all prompts.")


class Spread(Model):
    """Over the random artifacts."""

    low: float
    median: float
    high: float


class Floor(Model):
    """What random artifacts of equal norm or count do at one strength."""

    strength: Positive
    kl: Spread
    perplexity: Spread
    repetition: Spread
    target: Spread | None = None
    prompts: int | None = Field(default=None, description="Behind each random artifact; null in older cards.")


class Setting(Model):
    """Curves for one use of the artifact: op, place, options and tokens."""

    fingerprint: str
    model_id: str
    op: Op
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    options: dict[str, JsonValue]
    scope: Scope
    base: Outcome = Field(description="The untouched model on the same prompts.")
    up: tuple[Outcome, ...] = Field(min_length=2, description="By rising strength.")
    down: tuple[Outcome, ...] = Field(default=(), description="Negative strengths, by rising size.")
    floor: tuple[Floor, ...] = Field(default=(), description="The placebo floor; of the artifact's own layers only.")
    draws: int = Field(default=0, description="Random artifacts behind the floor.")
    prompts: int = Field(description="Neutral prompts, one completion each and strength.")
    target_prompts: int = 0
    prompts_digest: str | None = Field(default=None, description="SHA-256 of their tokens.")
    max_tokens: int
    temperature: float
    seed: int

    @model_validator(mode="after")
    def _rising(self) -> "Setting":
        for side in (self.up, self.down):
            strengths = [point.strength for point in side]
            if len(strengths) == 1 or any(a >= b for a, b in zip([0.0, *strengths], strengths, strict=False)):
                raise ValueError("strengths must rise from above 0, two of them at least")
        return self

    @property
    def key(self) -> tuple[object, ...]:
        return self.op, self.sites, self.layers, canonical(self.options), canonical_scope(self.scope)

    def calibrated(self) -> Calibrated:
        """The form the compiler takes."""
        return Calibrated(fingerprint=self.fingerprint, op=self.op, sites=self.sites,
                          layers=tuple(sorted(self.layers)), options=canonical(self.options),
                          scope=canonical_scope(self.scope), up=_curve(self.up),
                          down=_curve(self.down) if self.down else None)


class Calibration(Model):
    """Every setting that was calibrated; one of an equal place, options and tokens replaces the former."""

    version: Literal[1] = 1
    settings: tuple[Setting, ...] = Field(min_length=1)


def _curve(side: Sequence[Outcome]) -> Curve:
    return Curve(tuple(point.strength for point in side), tuple(point.kl for point in side))


def calibration_of(card: Mapping[str, Any] | None) -> Calibration | None:
    """Raises pydantic's ValidationError: what stands there is no calibration."""
    if card is None or KEY not in card:
        return None
    return Calibration.model_validate(card[KEY])


def with_settings(card: Mapping[str, Any] | None, settings: Sequence[Setting]) -> dict[str, Any]:
    """The card with these settings in place of equal ones. Settings of other weights are dropped."""
    former = calibration_of(card)
    fresh = {setting.key: setting for setting in settings}
    prints = {setting.fingerprint for setting in settings}
    kept = () if former is None else tuple(old for old in former.settings
                                           if old.key not in fresh and old.fingerprint in prints)
    joined = Calibration(settings=(*settings, *kept))
    return {**(card or {}), KEY: joined.model_dump(mode="json", exclude_defaults=True)}
