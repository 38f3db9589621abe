"""The receipt: what was applied, in every response."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from server.effects.report import Effects
from server.planner import Plan
from steering.scope import bits_at, touch_map
from steering.spec import Op, Site


class TokenCounts(BaseModel):
    """Tokens that one intervention acted on."""

    prompt: int
    generation: int


class ChoiceCounts(TokenCounts):
    """The same for one choice; the positions only with `"report": "tokens"`, counted from the prompt's start."""

    index: int = Field(description="Index of the choice.")
    positions: list[int] | None = Field(default=None, description="Positions of the touched tokens in prompt + "
                                        "completion.")


class AppliedIntervention(BaseModel):
    artifact: str = Field(description='Reference with version, "cheerful@3", or "inline".')
    source: Literal["default", "model", "preset", "request"] = Field(description="What asked for it.")
    op: Op
    sites: list[Site]
    layers: list[int]
    strength: dict[str, Any] = Field(description="Value and unit as asked for; scale: the factor applied, per layer.")
    options: dict[str, Any]
    tokens: TokenCounts = Field(description="Summed over the choices.")
    choices: list[ChoiceCounts]


class Receipt(BaseModel):
    """What was done to the model for this response. Unsteered: `applied` is empty and `disabled` false."""

    applied: list[AppliedIntervention] = Field(description="In order of action.")
    disabled: bool = Field(description="The kill switch held all steering back.")
    reason: str | None = Field(default=None, description="Why it is disabled.")
    presets: dict[str, str] = Field(default={}, description='Presets with version: by "model" name and by "preset".')
    engine: str
    report: Literal["none", "summary", "tokens"]
    effects: Effects | None = Field(default=None, description="What it did, measured; only if a report is asked for.")


@dataclass(frozen=True)
class Outcome:
    """One finished choice as the receipt needs it. `touched`: per intervention, tokens counted by the engine."""

    index: int
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    roles: Sequence[str] | None
    touched: Sequence[tuple[int, int]]


def receipt(plan: Plan, outcomes: Sequence[Outcome], engine: str, effects: Effects | None = None) -> Receipt:
    ordered = sorted(outcomes, key=lambda outcome: outcome.index)
    applied = []
    for j, (planned, compiled) in enumerate(zip(plan.planned, plan.program.compiled if plan.program else (),
                                                strict=True)):
        facts = compiled.applied
        choices = [ChoiceCounts(index=o.index, prompt=o.touched[j][0], generation=o.touched[j][1],
                                positions=_positions(plan, o, j) if plan.report == "tokens" else None)
                   for o in ordered]
        applied.append(AppliedIntervention(
            artifact=facts.artifact or "inline", source=planned.origin, op=facts.op, sites=list(facts.sites),
            layers=list(facts.layers), strength=dict(facts.strength), options=dict(facts.options),
            tokens=TokenCounts(prompt=sum(c.prompt for c in choices), generation=sum(c.generation for c in choices)),
            choices=choices))
    return Receipt(applied=applied, disabled=plan.disabled is not None, reason=plan.disabled,
                   presets=dict(plan.presets or {}), engine=engine, report=plan.report, effects=effects)


def _positions(plan: Plan, outcome: Outcome, j: int) -> list[int]:
    """Positions that intervention j touched, among as many tokens as the engine says it processed."""
    assert plan.program is not None
    if not plan.program.compiled[j].rows:
        return []
    touch = touch_map(plan.program.scopes, outcome.prompt_ids, len(outcome.generated_ids), outcome.roles)
    ids = np.asarray([*outcome.prompt_ids, *outcome.generated_ids], dtype=np.int64)
    bits = bits_at(touch, plan.program.rules, np.arange(len(ids)), ids)
    found = np.flatnonzero(bits & np.uint32(1 << j))
    prompt, generation = outcome.touched[j]
    in_prompt = found[found < touch.prompt_length][:prompt]
    in_generation = found[found >= touch.prompt_length][:generation]
    return [*map(int, in_prompt), *map(int, in_generation)]
