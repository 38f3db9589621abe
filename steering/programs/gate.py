"""Gates: conditions under which an intervention acts (CAST, Lee et al. 2024, arXiv 2409.05907).

A gate of `when: "prompt"` is decided once per prompt, outside of the model: the engine captures what the probe reads
while nothing acts on the model, and the program is then closed or opened (`Program.decided`). In three points this
server goes beyond the published code. The state belongs to the request. The untouched model is read, so that a
threshold means the same in every spec and interventions below the gated one cannot move it. The decision holds for
prompt and completion alike.

A gate of `when: "token"` is decided by the kernel, for each token, from the activation at the very place where the
intervention acts; it is a part of the row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from steering.artifacts.dictionary import Dictionary
from steering.artifacts.source import Source
from steering.language.errors import InvalidSpec, SteeringOverflow, TrimtabError
from steering.language.gates import Gate, Gates
from steering.language.vocabulary import Direction, Pooling, Site
from steering.models.facts import ModelFacts
from steering.ops.base import Row
from steering.programs.reading import Reader, compile_reader

Captured = Mapping[Site, Mapping[int, torch.Tensor]]


@dataclass(frozen=True)
class Condition:
    """One probe with its threshold."""

    reader: Reader
    pool: Pooling
    threshold: float
    direction: Direction

    def scores(self, captured: Captured) -> dict[int, float]:
        """The score of each layer, from the activations of a prompt at all positions; for the pool "last" those of the
        last position are enough."""
        found = captured[self.reader.site]
        return {layer: self.reader.pooled(layer, found[layer], self.pool) for layer in self.reader.layers}

    def met(self, scores: Mapping[int, float]) -> bool:
        """Whether the score of at least one layer lies on the side that opens the gate."""
        if self.direction == "above":
            return any(score > self.threshold for score in scores.values())
        return any(score < self.threshold for score in scores.values())

    def facts(self) -> dict[str, Any]:
        """What the receipt says of it."""
        return {"probe": self.reader.ref, "site": self.reader.site, "layers": list(self.reader.layers),
                "form": self.reader.form, "pool": self.pool, "threshold": self.threshold, "direction": self.direction,
                **({} if self.reader.feature is None else {"feature": self.reader.feature})}


@dataclass(frozen=True)
class Decision:
    """What a gate decided for one prompt. scores: per condition, layer -> score."""

    open: bool
    scores: tuple[Mapping[int, float], ...]


@dataclass(frozen=True)
class CompiledGate:
    """The conditions of one intervention, joined by `rule`."""

    conditions: tuple[Condition, ...]
    rule: Literal["all", "any"]
    when: Literal["prompt", "token"]

    def decide(self, captured: Captured) -> Decision:
        """Raises SteeringOverflow for a score that is not finite, because it lies on neither side of the threshold."""
        scores = tuple(condition.scores(captured) for condition in self.conditions)
        for condition, found in zip(self.conditions, scores, strict=True):
            for layer, score in found.items():
                if not math.isfinite(score):
                    raise SteeringOverflow(f"the score of {condition.reader.ref} at layer {layer} is not finite, so "
                                           "the gate cannot be decided", param="gate", fix="Scale the probe down.")
        met = [condition.met(found) for condition, found in zip(self.conditions, scores, strict=True)]
        return Decision(all(met) if self.rule == "all" else any(met), scores)


def gates_of(gate: Gate | Gates | None) -> list[Gate]:
    """The single gates of an intervention, in order."""
    if gate is None:
        return []
    return [gate] if isinstance(gate, Gate) else gate.members[1]


def compile_gate(gate: Gate | Gates | None, probes: Sequence[Source], facts: ModelFacts) -> CompiledGate | None:
    """
    Args:
        probes: the artifacts of `gates_of(gate)`, in order.

    Raises:
        TrimtabError: whose path begins at the intervention, `("gate", "any", 1, "threshold")` for example.
    """
    if gate is None:
        return None
    single = isinstance(gate, Gate)
    rule, members = ("all", [gate]) if isinstance(gate, Gate) else gate.members
    if not single and any(member.when == "token" for member in members):
        raise InvalidSpec("a gate decided per token stands alone", param="gate",
                          fix='Use when "prompt", or a single gate.')
    conditions = []
    for n, (member, probe) in enumerate(zip(members, probes, strict=True)):
        try:
            conditions.append(_condition(member, probe, facts))
        except TrimtabError as error:
            raise error.at("gate", *(() if single else (rule, n))) from None
    return CompiledGate(tuple(conditions), "any" if rule == "any" else "all", members[0].when)


def gated_row(row: Row, condition: Condition, layer: int) -> Row:
    """The row of an op with the condition beside it: it acts on tokens where weight . h + bias is over 0.

    Raises:
        InvalidSpec: the probe has no numbers at this layer.
    """
    if layer not in condition.reader.layers:
        raise InvalidSpec(f"a gate decided per token reads where the intervention acts, and {condition.reader.ref} has "
                          f"no numbers at layer {layer}", param=("gate", "layers"),
                          fix=f"Act at {', '.join(map(str, condition.reader.layers))}.")
    tensors, threshold = condition.reader.layers[layer], condition.threshold
    sign = 1.0 if condition.direction == "above" else -1.0
    if condition.reader.feature is not None:
        weight, bias, threshold = _of_feature(tensors, condition)
    else:
        weight = tensors["weight"] if "weight" in tensors else tensors["vector"]
        bias = tensors["bias"] if "weight" in tensors else torch.tensor(0.0)
    if not bool(torch.isfinite(bias - threshold)):
        raise InvalidSpec("the threshold is too far from the probe's bias: numbers overflow",
                          param=("gate", "threshold"))
    return Row(f"gated:{row.kernel}", {**row.tensors, "gate_weight": sign * weight,
                                       "gate_bias": sign * (bias - threshold)})


def _of_feature(tensors: Mapping[str, torch.Tensor], condition: Condition
                ) -> tuple[torch.Tensor, torch.Tensor, float]:
    """weight, bias and threshold of a linear score that lies on the same side as the feature does.

    A feature that is active has its pre-activation for its value, and one that is not is 0. So it is over a threshold
    of 0 or more where its pre-activation is over that and over the feature's own. It is never below 0.
    """
    feature, threshold = condition.reader.feature, condition.threshold
    weight = tensors["encoder"][feature]
    if threshold < 0 or (threshold == 0 and condition.direction == "below"):
        return torch.zeros_like(weight), torch.tensor(1.0), 0.0
    own = float(tensors["threshold"][feature]) if "threshold" in tensors else 0.0
    return weight, tensors["encoder_bias"][feature], max(threshold, own)


def check_token_gate(gate: CompiledGate, sites: Sequence[Site]) -> Condition:
    """The condition of a gate decided per token.

    Raises:
        InvalidSpec: naming what such a gate cannot do.
    """
    condition = gate.conditions[0]
    if condition.reader.feature is not None:
        for tensors in condition.reader.layers.values():
            if (dictionary := Dictionary(tensors)).k is not None or dictionary.norm:
                raise InvalidSpec(f"a gate decided per token is linear, and a feature of {condition.reader.ref} "
                                  "depends on all features, or on the token's norm", param=("gate", "when"),
                                  fix='Use when "prompt", or an SAE with thresholds.')
    elif condition.reader.form != "linear":
        raise InvalidSpec(f"a gate decided per token is linear, not {condition.reader.form}", param=("gate", "form"),
                          fix='Use a probe or vector with form "linear", or when "prompt".')
    if tuple(sites) != (condition.reader.site,) or condition.reader.site == "router":
        raise InvalidSpec(f"a gate decided per token reads where the intervention acts; the probe reads "
                          f"{condition.reader.site}, the intervention acts at {', '.join(sites)}",
                          param=("gate", "when"), fix='Use when "prompt".')
    return condition


def _condition(gate: Gate, probe: Source, facts: ModelFacts) -> Condition:
    reader = compile_reader(probe, facts, form=gate.form, layers=gate.layers, feature=gate.feature,
                            any_model="model" in gate.override)
    if reader.windowed:
        raise InvalidSpec(f"the form {reader.form} looks at many tokens together, so a gate cannot be decided by it",
                          param="form", fix="Use mahalanobis, residual or membership, or a monitor.")
    own = probe.reading
    threshold = gate.threshold
    if threshold is None:
        # A recorded threshold belongs to the form and pool it was found for.
        changed = own is None or reader.form != own.form or (gate.pool is not None and gate.pool != own.pool)
        threshold = None if own is None or changed else own.threshold
    if threshold is None:
        raise InvalidSpec(f"{probe.ref} records no threshold for this reading", param="threshold",
                          fix="Give one, or use a probe made by POST /v1/extract/condition.")
    return Condition(reader, gate.pool or (own.pool if own is not None else "mean"), threshold,
                     gate.direction or (own.direction if own is not None else "above"))
