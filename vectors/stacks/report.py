"""What a check of a stack found, and the rules by which something is advised."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from steering.language.vocabulary import Op, Site

# Below LOST of its change an intervention is as good as erased; over WHOLE it is as good as untouched. Beyond ALONG two
# change the same tokens. Below NOTHING nats one does nothing.
LOST, WHOLE, ALONG, NOTHING = 0.1, 0.5, 0.7, 1e-5
RULE = (f"idle: alone it does less than {NOTHING:g} nats on these prompts. erased: a later one leaves less than {LOST} "
        f"of its change. reversed: a later one turns it against itself by more than {LOST}. With the order of the two "
        f"exchanged more than {WHOLE} of it would be left: reorder; else drop it. together and against: the changes "
        f"that two make to the log-probabilities have a correlation over {ALONG}, or under -{ALONG}.")
Finding = Literal["idle", "erased", "reversed", "together", "against"]


class Meeting(BaseModel):
    """Two interventions where the later one acts on what the earlier one left, at its own site and layer."""

    site: Site
    layer: int
    from_site: Site = Field(description="Where the earlier one acts. It is another place where its change comes along "
                            "in the residual stream.")
    from_layer: int
    tokens: int = Field(description="On which both act, of those that were looked at.")
    kept: float | None = Field(description="Share of the earlier one's change that is left behind the later one: 1 "
                               "all, 0 erased, negative reversed. Null where changes are not finite.")
    exchanged: float | None = Field(description="The same if the earlier one acted after the later one. Null where "
                                    "order in the spec is not what decides, because their layers do.")
    order: float | None = Field(description="How far the two orders lie apart, as a share of the lengths of both "
                                "changes. 0: they commute.")
    cosine: float = Field(description="Of the two subspaces that they move activations along, 0 to 1.")
    overlap: float = Field(description="The same in the metric of the activations: correlation of the coordinates "
                           "along the two, over the tokens that were read.")
    shared: list[int] = Field(description="Neurons, heads or experts that both change; empty where one of them changes "
                              "the whole width. At most 64 are listed.")


class Pair(BaseModel):
    """Two interventions of the stack, by their numbers."""

    first: int
    second: int
    interference: float = Field(description="KL that both together are predicted to have, beyond the sum of their "
                                "own, in nats.")
    correlation: float = Field(description="Of the changes that each alone makes to the log-probabilities, under the "
                               "untouched model's probabilities.")
    measured: bool = Field(description="Whether the two were run together for the prediction.")
    meetings: list[Meeting] = Field(description="Where one acts on what the other left; the most telling 4.")


class Part(BaseModel):
    """One intervention."""

    op: Op
    artifact: str | None = Field(description="Reference; null for numbers given inline.")
    sites: list[Site]
    layers: list[int]
    origin: str = Field(default="request", description="policy, default, preset or request.")
    kl: float = Field(description="Of it alone, in nats.")


class Advice(BaseModel):
    """What to change, and why."""

    finding: Finding
    interventions: list[int] = Field(description="By number; the first is the one to move or to drop.")
    do: Literal["reorder", "drop", "weaken", "nothing"]
    text: str
    kl: float | None = Field(default=None, description="Of the stack after it was reordered so, in nats.")


class StackCheck(BaseModel):
    """The report of a check. KL(steered || untouched) of the next token, mean over the tokens that were read."""

    interventions: list[Part]
    pairs: list[Pair]
    sum_of_parts: float = Field(description="KL of each alone, summed.")
    predicted: float = Field(description="KL of the stack, from its parts and from the pairs that were run.")
    interference: float = Field(description="predicted minus sum_of_parts.")
    measured: float = Field(description="KL of the stack itself, on the same texts.")
    measured_interference: float = Field(description="measured minus sum_of_parts.")
    advice: list[Advice]
    rule: str = RULE
    texts: int
    tokens: int = Field(description="Of continuations that the untouched model wrote, on which KL was measured.")


def advised(parts: Sequence[Part], pairs: Sequence[Pair]) -> list[Advice]:
    """By the rule, without what a reordered stack does."""
    found = [Advice(finding="idle", interventions=[n], do="drop", text=f"intervention {n} ({named(part)}) does nothing "
                    "on these prompts by itself; look at its scope and its gate, or leave it out")
             for n, part in enumerate(parts) if part.kl < NOTHING]
    for pair in pairs:
        worst = min((one for one in pair.meetings if one.kept is not None), key=lambda one: one.kept or 0.0,
                    default=None)
        kept = None if worst is None else worst.kept
        if worst is not None and kept is not None and kept < LOST:
            found.append(_lost(pair, worst, kept, parts))
        elif abs(pair.correlation) > ALONG:
            found.append(_alike(pair, parts))
    return found


def _lost(pair: Pair, at: Meeting, kept: float, parts: Sequence[Part]) -> Advice:
    finding: Finding = "reversed" if kept < -LOST else "erased"
    # What comes first is told by where they act, and only at one place by the order in the spec.
    early, late = pair.first, pair.second
    told = (f"intervention {late} ({named(parts[late])}) leaves {kept:.2f} of what intervention {early} "
            f"({named(parts[early])}) does, at {at.site} of layer {at.layer}")
    if at.exchanged is not None and at.exchanged > WHOLE:
        return Advice(finding=finding, interventions=[early, late], do="reorder",
                      text=f"{told}; after it {at.exchanged:.2f} would be left")
    return Advice(finding=finding, interventions=[early, late], do="drop",
                  text=f"{told}, and no order of the two changes that; leave one of them out")


def _alike(pair: Pair, parts: Sequence[Part]) -> Advice:
    both = f"interventions {pair.first} ({named(parts[pair.first])}) and {pair.second} ({named(parts[pair.second])})"
    if pair.correlation > 0:
        return Advice(finding="together", interventions=[pair.first, pair.second], do="weaken",
                      text=f"{both} change the same tokens in the same sense: together {pair.interference:+.3g} nats "
                      "beyond their sum; lower the strength of one")
    return Advice(finding="against", interventions=[pair.first, pair.second], do="weaken",
                  text=f"{both} change the same tokens in opposite senses: together {pair.interference:+.3g} nats "
                  "beyond their sum; each takes back what the other does")


def named(part: Part) -> str:
    return f"{part.op} {part.artifact or 'inline numbers'}"
