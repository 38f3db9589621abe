"""What the maker of a roll-out states: its steps, and the guard rails that end it."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from vectors.evaluate.graders.named import text_graders

Metric = Literal["dose", "outcome", "refusals", "repetition", "latency", "errors"]
# What is as large as this, or larger, counts as this: nats a token, seconds a token, and shares as they are.
SCALES: dict[str, float] = {"dose": 2.0, "latency": 0.25}
# What is only known of answers that were given to somebody.
LIVE_ONLY = ("latency",)
MOST_STEPS, MOST_RAILS, MOST_KEYS = 20, 12, 100
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
KeyId = Annotated[str, StringConstraints(min_length=1, max_length=24)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Step(Model):
    """A step of the ramp. The next one begins once this one has lasted and every guard rail has its samples."""

    share: Share = Field(default=0.0, description="Of the users, those that get the candidate.")
    shadow: Share = Field(default=0.0, description="Of the answers of the stable version, those whose prompts the "
                          "candidate is run on too, in spare time; that answer is measured and thrown away.")
    wait_s: Annotated[float, Field(ge=0, le=30 * 86400, allow_inf_nan=False)] = Field(
        default=600.0, description="How long the step lasts at least.")


class Rail(Model):
    """A guard rail: in what the candidate must not be worse than the stable version, and by how much."""

    metric: Metric = Field(description="dose: nats a token, against the untouched model; outcome: share of answers "
                           "that are `outcome` by `grader`; refusals: share of answers that the grader `refusal` calls "
                           "refused; repetition: share of repeated 3-grams; latency: seconds a token; errors: share of "
                           "requests that fail.")
    grader: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        default=None, description='With outcome: "refusal" or "language=fr", say.')
    outcome: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    worse: Literal["higher", "lower"] = Field(default="higher", description="Which way is worse.")
    margin: Annotated[float, Field(ge=0, lt=1e6, allow_inf_nan=False)] = Field(
        description="How much worse the candidate may be, in the unit of the metric.")
    scale: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = Field(
        default=None, description="What is larger counts as this. The test is the sharper the closer this is to what "
        "occurs. By default 2 nats, 0.25 seconds, and 1 for shares, which needs no other.")
    samples: Annotated[int, Field(ge=1, le=10**6)] = Field(
        default=50, description="Of each arm, that are needed in each step before the next one begins, and before the "
        "rail may end the roll-out.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.metric == "outcome") != (self.outcome is not None and self.grader is not None):
            raise ValueError("grader and outcome go with the metric outcome, and with no other")
        if self.grader is not None:
            grader = text_graders([self.grader])[0]
            known = [*map(grader.told, grader.outcomes), "broken"]
            if self.outcome not in known:
                raise ValueError(f"the grader {self.grader} knows the outcomes {', '.join(known)}")
        if self.margin >= self.unit:
            raise ValueError(f"a margin of {self.margin:g} is never passed, because values end at {self.unit:g}")
        if self.scale is not None and self.metric not in SCALES:
            raise ValueError("shares need no scale")
        return self

    @property
    def unit(self) -> float:
        return self.scale or SCALES.get(self.metric, 1.0)

    @property
    def graded(self) -> tuple[str, str] | None:
        """The grader it needs, and the outcome that it counts."""
        if self.metric == "refusals":
            return "refusal", "refused"
        return None if self.grader is None or self.outcome is None else (self.grader, self.outcome)

    @property
    def label(self) -> str:
        return self.metric if self.metric != "outcome" else f"outcome:{self.grader}:{self.outcome}"

    def scaled(self, value: float) -> float:
        """In [0, 1], larger is worse."""
        share = min(max(value / self.unit, 0.0), 1.0)
        return share if self.worse == "higher" else 1.0 - share


class Terms(Model):
    steps: Annotated[list[Step], Field(min_length=1, max_length=MOST_STEPS)] = Field(
        description="In order; shares do not fall.")
    keys: Annotated[list[KeyId], Field(max_length=MOST_KEYS)] = Field(
        default=[], description="Ids of keys whose requests always get the candidate.")
    rails: Annotated[list[Rail], Field(max_length=MOST_RAILS)] = Field(
        default=[], description="Any of which ends the roll-out.")
    alpha: Annotated[float, Field(gt=0, le=0.5)] = Field(
        default=0.05, description="How often at most the rails, all together and however long they look, end a "
        "roll-out whose candidate is within all margins.")
    sample: Share = Field(default=0.2, description="Of the answers of each arm, those that are measured and graded "
                          "for rails that need it. Measuring stays within TRIMTAB_SHADOW_BUDGET.")
    then: Literal["hold", "promote"] = Field(
        default="hold", description="After the last step: wait for somebody to promote it, or do so.")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        shares = [step.share for step in self.steps]
        if shares != sorted(shares):
            raise ValueError("the shares of steps must not fall")
        if any(not step.share and not step.shadow for step in self.steps) and not self.keys:
            raise ValueError("a step with neither share nor shadow tries nothing")
        if self.then == "promote" and not self.rails:
            raise ValueError("without guard rails nothing is promoted by itself")
        if len({rail.model_dump_json() for rail in self.rails}) != len(self.rails):
            raise ValueError("two guard rails are the same")
        return self

    @property
    def alpha_each(self) -> float:
        """By the union bound."""
        return self.alpha / max(len(self.rails), 1)

    def live(self, step: Step) -> bool:
        """Whether somebody is answered by the candidate."""
        return step.share > 0 or bool(self.keys)

    def waits_for(self, step: Step) -> Sequence[int]:
        """Numbers of the rails that get samples in a step."""
        return [n for n, rail in enumerate(self.rails) if self.live(step) or rail.metric not in LIVE_ONLY]
