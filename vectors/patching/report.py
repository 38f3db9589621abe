"""What a check of a patch found, and the rule by which it is judged."""

from typing import Literal

from pydantic import BaseModel, Field

Verdict = Literal["faithful", "illusory", "no_effect"]
# Below this share of the logit difference nothing is called an effect, and a part has to do so much of the whole.
LEAST, PART = 0.1, 0.5
RULE = (f"no_effect: the direction takes away no more of the logit difference than {LEAST}, or than 95 % of the random "
        f"directions do, which move the token as far. illusory: the part that the readers see does less than {PART} of "
        f"what the direction does, or the whole activation does. faithful: neither.")


class Condition(BaseModel):
    """What patching one part does, over all pairs."""

    interchange: float = Field(description="Share of pairs whose likeliest next token becomes the source's answer.")
    decrease: float = Field(description="Share of the logit difference of the two answers that is taken away: 0 "
                            "nothing, 1 all of it, over 1 reversed.")
    kl: float = Field(description="KL(source || patched) of the next token, in nats, mean over pairs.")
    moved: float = Field(description="Length of the change of the token, mean over pairs.")


class PatchCheck(BaseModel):
    """The report of a check."""

    verdict: Verdict
    rule: str = RULE
    site: str
    layer: int
    readers: list[str] = Field(description="Whose row space is the visible part.")
    rank: int = Field(description="Of the directions.")
    width: int
    seen: int = Field(description="Dimensions that the readers see.")
    row_norm: float = Field(description="Length of the visible part of a direction of length 1.")
    null_norm: float = Field(description="Length of the invisible part.")
    pairs: int = Field(description="Those that were used: base and source each answered right by themselves.")
    dropped: int = Field(description="Pairs left out, because the model prefers the other one's answer unpatched.")
    clean: Condition = Field(description="The base run itself.")
    full: Condition = Field(description="The whole activation.")
    direction: Condition
    row: Condition | None = Field(description="The visible part alone; null where there is none.")
    null: Condition | None = Field(description="The invisible part alone; null where there is none.")
    random: list[Condition] = Field(description="Random directions by which the token is moved as far as by the "
                                    "direction.")
    random_95: float = Field(description="95th percentile of their decrease.")
    dormancy: float | None = Field(description="How far base and source lie apart along the visible part, as a share "
                                   "of that along the direction; near 0: the visible part hardly differs by itself.")
    dormancy_variance: float | None = Field(description="The same of variances over all runs.")
    warnings: list[str] = []


def judged(direction: float, row: float | None, full: float, random_95: float) -> Verdict:
    """By decreases."""
    if direction <= max(LEAST, random_95):
        return "no_effect"
    if row is None or min(row, full) < PART * direction:
        return "illusory"
    return "faithful"
