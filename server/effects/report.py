"""What is told of a measured completion: in the response, and summed up for metrics and the database."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from server.effects.degeneration import Degeneration
from server.engines.data import Comparison
from steering.divergence import Divergence
from steering.language.vocabulary import Op
from steering.programs.program import Program

# Artifact and op of what stands for a whole spec.
ALL = "all"
# What stands in the artifact's place of an answer to which nothing was applied.
UNTOUCHED = "untouched"
# Of a divergence, what is told beside KL by its mean over the tokens.
MEANS = ("reverse_kl", "entropy", "other_entropy", "top1_agree", "surprise", "rank")


class InArm(NamedTuple):
    """An arm of a roll-out that a completion belongs to: the id of the roll-out, and "stable" or "candidate"."""

    rollout: str
    arm: str


# Of the rows that count every completion, whichever arms it belongs to.
EVERY = InArm("", "")


class Spread(BaseModel):
    """Of one number over the generated tokens."""

    mean: float
    p50: float
    p95: float
    max: float


class Shift(BaseModel):
    """How the next-token distribution moved, over the generated tokens of one completion."""

    kl: Spread = Field(description="KL(steered || other) in nats.")
    reverse_kl: float = Field(description="Mean KL(other || steered) in nats.")
    entropy_change: float = Field(description="Mean entropy of the steered run less that of the other, in nats.")
    top1_changed: float = Field(description="Share of tokens whose likeliest next token differs.")
    surprise: float = Field(description="Mean -log p of the generated tokens under the other run, in nats.")
    rank: float = Field(description="Mean number of tokens that the other run found likelier than the generated one.")


class InterventionEffect(BaseModel):
    """One intervention's own share: the whole spec against the spec without it."""

    artifact: str = Field(description='Reference with version, or "inline".')
    op: Op
    shift: Shift
    card_kl: float | None = Field(default=None, description="Mean KL that the artifact's calibration measured at this "
                                  "strength, in nats.")


@dataclass(frozen=True)
class Share:
    """What metrics and the database keep of one completion for an artifact and op: means over its tokens."""

    artifact: str
    op: str
    kl: float
    entropy_change: float
    top1_changed: float


class PerToken(BaseModel):
    """One number per generated token; `interventions` holds one list of KL per intervention."""

    kl: list[float]
    reverse_kl: list[float]
    entropy: list[float]
    base_entropy: list[float]
    top1_agree: list[bool]
    surprise: list[float]
    rank: list[int]
    interventions: list[list[float]]


class TextSigns(BaseModel):
    """Signs of a text that broke down."""

    repetition: float = Field(description="Share of 3-grams of tokens that occurred before in the completion.")
    compression: float = Field(description="Bytes of the text over its zlib-compressed bytes.")
    length: int = Field(description="Tokens generated.")
    ended: bool = Field(description="The model ended the text itself.")
    excess_surprise: float = Field(description="Mean surprise of the text under the untouched model less the mean "
                                   "entropy of that model at the same places, in nats: near 0 of a text such as it "
                                   "writes itself, far above of word salad.")
    end_probability: float = Field(description="Mean probability that the text ends at a token.")
    base_end_probability: float = Field(description="The same under the untouched model, on the same tokens.")
    base_ended: float = Field(description="Chance that the untouched model would have ended this text within its "
                              "length: near 0 of a text that was cut short, near 1 of one that ran on.")


class ChoiceEffect(BaseModel):
    """One completion: the spec against the untouched model on the same tokens, and each intervention's share."""

    index: int
    tokens: int = Field(description="Generated tokens that were measured.")
    exact: bool = Field(description="Over the full vocabulary; false: lower bounds.")
    total: Shift
    interventions: list[InterventionEffect]
    residual_relative: float = Field(description="Mean |steered - base| / |base| of the last layer's residual stream.")
    residual_cosine: float = Field(description="Mean cosine of the two.")
    text: TextSigns
    per_token: PerToken | None = Field(default=None, description='Only with "report": "tokens".')

    def shares(self) -> list[Share]:
        """The whole spec as artifact and op "all", then each artifact and op once: the mean where a spec uses it more
        than once, so that nobody counts the completion twice."""
        uses: dict[tuple[str, str], list[Shift]] = {(ALL, ALL): [self.total]}
        for item in self.interventions:
            uses.setdefault((item.artifact, str(item.op)), []).append(item.shift)
        return [Share(artifact, op, fmean(s.kl.mean for s in shifts), fmean(s.entropy_change for s in shifts),
                      fmean(s.top1_changed for s in shifts)) for (artifact, op), shifts in uses.items()]


class Effects(BaseModel):
    """What the steering of this response did. `status` says why there are no numbers where there are none."""

    status: Literal["measured", "unsteered", "failed"]
    reason: str | None = None
    choices: list[ChoiceEffect] = []


def choice_effect(index: int, comparison: Comparison, program: Program, signs: Degeneration, *, per_token: bool
                  ) -> ChoiceEffect:
    total = _shift(comparison.total)
    return ChoiceEffect(
        index=index, tokens=len(comparison.total), exact=comparison.exact, total=total,
        # The share of a single intervention is the total.
        interventions=[InterventionEffect(artifact=item.applied.artifact or "inline", op=item.op,
                                          shift=total if part is comparison.total else _shift(part),
                                          card_kl=item.applied.card_kl)
                       for item, part in zip(program.compiled, comparison.without, strict=True)],
        residual_relative=float(comparison.residual.relative.numpy().mean()),
        residual_cosine=float(comparison.residual.cosine.numpy().mean()),
        text=_text_signs(signs, comparison.total),
        per_token=_per_token(comparison.total, comparison.without) if per_token else None)


def _text_signs(signs: Degeneration, total: Divergence) -> TextSigns:
    other_end = total.other_end.numpy()
    goes_on = (1 - other_end.astype(np.float64)).clip(0).prod()
    surprise, usual = total.surprise.numpy(), total.other_entropy.numpy()
    return TextSigns(**vars(signs), excess_surprise=float(surprise.mean() - usual.mean()),
                     end_probability=float(total.end.numpy().mean()),
                     base_end_probability=float(other_end.mean()), base_ended=1 - float(goes_on))


def _shift(found: Divergence) -> Shift:
    # By numpy and at once, because a few dozen numbers are not worth the start of many operations.
    kl = found.kl.numpy()
    places = np.array([0.5, 0.95]) * (len(kl) - 1)
    middle, high = np.interp(places, np.arange(len(kl)), np.sort(kl)).tolist()
    means = np.stack([kl, *(getattr(found, name).numpy() for name in MEANS)]).mean(axis=1, dtype=np.float64)
    mean, reverse, entropy, other_entropy, agreed, surprise, rank = means.tolist()
    return Shift(kl=Spread(mean=mean, p50=middle, p95=high, max=float(kl.max())), reverse_kl=reverse,
                 entropy_change=entropy - other_entropy, top1_changed=1 - agreed, surprise=surprise, rank=rank)


def _per_token(total: Divergence, without: Sequence[Divergence]) -> PerToken:
    return PerToken(
        kl=total.kl.tolist(), reverse_kl=total.reverse_kl.tolist(), entropy=total.entropy.tolist(),
        base_entropy=total.other_entropy.tolist(), top1_agree=[bool(x) for x in total.top1_agree.tolist()],
        surprise=total.surprise.tolist(), rank=[int(x) for x in total.rank.tolist()],
        interventions=[part.kl.tolist() for part in without])
