"""An evaluation as it is stored and shown: one model of what was asked, what each arm did and what that says."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from vectors.evaluate.run import Arm, Evaluation, Graded
from vectors.evaluate.shares import Share

# A random artifact of equal size does as well this often at most where an effect is spoken of.
CHANCE = 0.05
# Broken texts over the untouched model's share, where a spec is said to damage.
MORE_BROKEN = 0.05
LONGEST_SAMPLE = 4000


class View(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShareView(View):
    count: int
    total: int
    share: float
    low: float = Field(description="Lower end of the 95 % interval (Wilson).")
    high: float = Field(description="Upper end.")

    @classmethod
    def of(cls, share: Share) -> "ShareView":
        return cls(count=share.count, total=share.total, share=share.value, low=share.low, high=share.high)


class GradedView(View):
    grader: str
    outcomes: dict[str, ShareView]
    success: ShareView
    broken: ShareView

    @classmethod
    def of(cls, graded: Graded) -> "GradedView":
        return cls(grader=graded.grader, outcomes={name: ShareView.of(one) for name, one in graded.outcomes.items()},
                   success=ShareView.of(graded.success), broken=ShareView.of(graded.broken))


class SampleView(View):
    prompt: int = Field(description="Number of the prompt, from 0.")
    text: str
    outcomes: list[str] = Field(description="By each grader.")


class ArmView(View):
    dose: float = Field(description="What the strengths were multiplied with; 0 for the arm without the spec.")
    graded: list[GradedView]
    kl: float = Field(description="Mean KL(steered || untouched), nats per token.")
    perplexity: float = Field(description="Of the texts under the untouched model.")
    repetition: float = Field(description="Share of repeated 3-grams.")
    samples: list[SampleView] = []
    controls: GradedView | None = Field(default=None, description="The first grader on prompts that should not change.")
    tasks: ShareView | None = Field(default=None, description="Unrelated questions answered rightly.")

    @classmethod
    def of(cls, arm: Arm) -> "ArmView":
        return cls(dose=arm.dose, graded=[GradedView.of(one) for one in arm.graded], kl=arm.kl,
                   perplexity=arm.perplexity, repetition=arm.repetition,
                   samples=[SampleView(prompt=n, text=text[:LONGEST_SAMPLE], outcomes=list(outcomes))
                            for n, text, outcomes in arm.samples],
                   controls=None if arm.controls is None else GradedView.of(arm.controls),
                   tasks=None if arm.tasks is None else ShareView.of(arm.tasks))


class DoseView(View):
    """The spec at one dose, beside random artifacts of equal size."""

    steered: ArmView
    random: list[ArmView] = Field(description="One for each draw; samples of the first draw only.")
    chance: list[float] = Field(description="By each grader: how often a random artifact succeeds as often as the "
                                "spec, its own draw counted. Empty without draws.")
    verdict: list[str] = Field(description="What this says, in words, by each grader.")


class EvaluationReport(View):
    """All that one evaluation measured."""

    id: str
    created_at: datetime
    model: str
    fingerprint: str
    engine: str
    spec: dict[str, Any] = Field(description="As it was given.")
    artifacts: list[str] = Field(description="The versions that were applied.")
    preset: str | None = None
    mandatory: list[str] = Field(default=[], description="What acted in front of every arm, also of the one that is "
                                 "called untouched, because a policy that holds for who asked has a mandatory spec: "
                                 "artifacts with version, inline for numbers.")
    graders: list[dict[str, Any]]
    prompts: int
    controls: int
    tasks: int
    doses: list[float]
    draws: int
    max_tokens: int
    temperature: float
    seed: int
    shown: list[str] = Field(description="The prompts that samples are kept of.")
    untouched: ArmView
    results: list[DoseView]

    def summary(self) -> "EvaluationSummary":
        """The report without its texts and draws."""
        return EvaluationSummary(
            id=self.id, created_at=self.created_at, model=self.model, fingerprint=self.fingerprint,
            artifacts=self.artifacts, preset=self.preset, mandatory=self.mandatory,
            graders=[str(one["kind"]) for one in self.graders],
            prompts=self.prompts, draws=self.draws,
            untouched=_outcome(self.untouched, []),
            results=[_outcome(one.steered, one.chance) for one in self.results])


class OutcomeSummary(View):
    dose: float
    success: list[float] = Field(description="Share of successes, by each grader.")
    broken: list[float]
    chance: list[float] = Field(description="By each grader; empty without random artifacts.")
    kl: float


class EvaluationSummary(View):
    id: str
    created_at: datetime
    model: str
    fingerprint: str
    artifacts: list[str]
    preset: str | None
    mandatory: list[str] = Field(default=[], description="What acted in front of every arm; such an evaluation passes "
                                 "no requirement of an alias.")
    graders: list[str]
    prompts: int
    draws: int
    untouched: OutcomeSummary
    results: list[OutcomeSummary]


def doses_of(found: Evaluation, base: str = "untouched") -> list[DoseView]:
    """What an evaluation found, dose by dose. base: what the arm without the spec is called."""
    graders = range(len(found.untouched.graded))
    views = []
    for n, steered in enumerate(found.steered):
        random = found.random[n] if found.random else ()
        chance = [found.chance(n, grader) for grader in graders] if random else []
        draws = [ArmView.of(arm) for arm in random]
        views.append(DoseView(
            steered=ArmView.of(steered), chance=chance,
            random=[draw if k == 0 else draw.model_copy(update={"samples": []}) for k, draw in enumerate(draws)],
            verdict=[_verdict(found.untouched, steered, random, chance, grader, base) for grader in graders]))
    return views


def _verdict(untouched: Arm, steered: Arm, random: Sequence[Arm], chance: Sequence[float], grader: int,
             base: str) -> str:
    """One grader's finding at one dose as a sentence that stands for itself."""
    now, before = steered.graded[grader], untouched.graded[grader]
    said = f"{_shown(now.success)} succeed, {base} {_shown(before.success)}"
    if random:
        shares = sorted(arm.graded[grader].success.value for arm in random)
        said += f", random artifacts of equal size {shares[0]:.0%} to {shares[-1]:.0%}"
    said += f"; {_shown(now.broken)} are broken, {base} {_shown(before.broken)}."
    if not random:
        said += " Nothing was compared with random artifacts."
    elif now.success.value <= before.success.value:
        said += " The spec does not raise the success."
    elif chance[grader] <= CHANCE:
        said += f" {'No' if max(shares) < now.success.value else 'Hardly a'} random artifact does that."
    else:
        said += (f" Random artifacts do as well in {chance[grader]:.0%} of the draws, so this is no effect of the "
                 "artifact's own numbers.")
    if now.broken.value > before.broken.value + MORE_BROKEN:
        said += " The spec breaks texts at this dose."
    return said


def _shown(share: Share) -> str:
    return f"{share.count} of {share.total}"


def _outcome(arm: ArmView, chance: list[float]) -> OutcomeSummary:
    return OutcomeSummary(dose=arm.dose, success=[one.success.share for one in arm.graded],
                          broken=[one.broken.share for one in arm.graded], chance=chance, kl=arm.kl)
