"""The receipt: what was applied, in every response."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from server.effects.outcomes import Outcomes
from server.effects.report import Effects
from server.engines.data import Touched
from server.requests.gates import Decided
from server.requests.guard import Event
from server.requests.monitor import MonitorReport
from server.requests.plan import Plan, Planned
from server.rollouts.arms import ArmName
from steering.language.spec import Report
from steering.language.vocabulary import Direction, Form, Op, Pooling, Section, Site
from steering.programs.gate import CompiledGate, Decision
from steering.programs.program import Program
from steering.programs.touch import Bits, names_sections

# A receipt warns of a strength that is so many times the artifact's own.
STRONG_MULTIPLE = 5


class TokenCounts(BaseModel):
    """Tokens that one intervention acted on."""

    prompt: int
    generation: int


class StepSize(BaseModel):
    """How far an intervention moved tokens: |h' - h| / |h|, measured where it acts.

    Over the tokens and layers that ran; a prefix that came from the cache did not. Interventions at routers have none.
    """

    max: float = Field(description="Largest relative step, as it was asked for.")
    mean: float = Field(description="Mean over tokens and layers.")
    clipped: int = Field(description="Steps that were shortened to the server's limit.")


class GateFacts(BaseModel):
    """One condition of a gate, as it was read."""

    probe: str = Field(description="Reference with version.")
    site: Site
    layers: list[int]
    form: Form
    pool: Pooling
    threshold: float
    direction: Direction


class GateReceipt(BaseModel):
    """The gate of an intervention. If it is decided for each token, the counted tokens are those that it looked at."""

    rule: Literal["all", "any"] = Field(description="How several conditions are joined.")
    when: Literal["prompt", "token"]
    conditions: list[GateFacts]


class GateDecision(BaseModel):
    """What a gate decided for the prompt of a choice."""

    open: bool
    scores: list[dict[str, float]] = Field(description="Per condition, layer to score.")


class GuardEvent(BaseModel):
    """A guard weakened an intervention."""

    token: int = Field(description="From this generated token on (0 is the first).")
    factor: float = Field(description="What is left of its strength; 0: stopped.")
    reason: Literal["kl", "repetition", "monitor", "unmeasured"] = Field(
        description="What was over its limit; unmeasured: the check failed, which stops everything.")
    kl: float | None = Field(description="Mean KL(steered || untouched) of the checked tokens, in nats.")
    repetition: float = Field(description="Share of their 3-grams that occurred before.")


class ChoiceCounts(TokenCounts):
    """The same for one choice; the positions only with `"report": "tokens"`, counted from the prompt's start."""

    index: int = Field(description="Index of the choice.")
    positions: list[int] | None = Field(default=None, description="Positions of the touched tokens in prompt + "
                                        "completion.")
    guard: list[GuardEvent] = Field(default=[], description="What guards did to the intervention in this choice.")
    gate: GateDecision | None = Field(default=None, description="Of interventions with a gate decided per prompt.")
    step: StepSize | None = Field(default=None, description="How far it moved the tokens of this choice; null where no "
                                  "step was measured.")


class ReceiptWarning(BaseModel):
    """Something that was done as asked and is rarely meant."""

    code: Literal["strong", "clipped", "card", "policy", "massive"] = Field(
        description=f"strong: {STRONG_MULTIPLE} times the artifact's own strength or more; clipped: steps were over "
        "the server's limit; card: what the artifact's card warns of, that it is a draft, say; policy: a policy "
        "lowered the strength; massive: the first position is steered, or dims, where the model keeps massive "
        "activations.")
    intervention: int = Field(description="Index in `applied`.")
    message: str


class AppliedIntervention(BaseModel):
    artifact: str = Field(description='Reference with version, "cheerful@3", or "inline".')
    card: str | None = Field(default=None, description="Digest of the artifact's card as it was read, if it has one. "
                             "Another one beside the same reference: the card was changed meanwhile, by a calibration "
                             "say, and with it the strength that a dose comes down to.")
    source: Literal["policy", "default", "model", "preset", "request"] = Field(
        description="What asked for it; policy: the mandatory spec of a policy.")
    op: Op
    sites: list[Site]
    layers: list[int]
    strength: dict[str, Any] = Field(description="Value and unit as asked for; scale: the factor applied, per layer.")
    options: dict[str, Any]
    gate: GateReceipt | None = Field(default=None, description="The condition, of interventions with a gate.")
    tokens: TokenCounts = Field(description="Summed over the choices.")
    choices: list[ChoiceCounts]


class ContrastReceipt(BaseModel):
    """The weak run beside the strong one, which `applied` tells of."""

    weak: list[AppliedIntervention] = Field(description="What acted in the weak run, in order of action.")
    alpha: float
    beta: float


class RolloutArm(BaseModel):
    """The arm of a roll-out that a request belongs to."""

    rollout: str = Field(description="Its id.")
    target: str = Field(description='The alias, "cheerful@production".')
    arm: ArmName
    ref: str = Field(description="The version that acted.")


class Receipt(BaseModel):
    """What was done to the model for this response. Unsteered: `applied` is empty and `disabled` false."""

    applied: list[AppliedIntervention] = Field(description="In order of action.")
    disabled: bool = Field(description="The kill switch held all steering back.")
    reason: str | None = Field(default=None, description="Why it is disabled.")
    presets: dict[str, str] = Field(default={}, description='Presets with version: by "model" name and by "preset".')
    engine: str
    report: Report
    effects: Effects | None = Field(default=None, description="What it did, measured; only if a report is asked for.")
    outcomes: Outcomes | None = Field(default=None, description='What the answers were; only with "report": "outcome".')
    monitor: list[MonitorReport] = Field(default=[], description="What the monitors read, in the order asked for.")
    guard_checks: list[int | None] = Field(default=[], description="Per choice, how often its guards were checked; "
                                           "null where nothing was guarded.")
    switched_off: list[int | None] = Field(default=[], description="Per choice, the generated token (0 is the first) "
                                           "from which on nothing was steered, as the kill switch was turned on "
                                           "meanwhile; the choice ends there where the server is set so. Null where it "
                                           "was not.")
    sections: list[dict[Section, int]] = Field(default=[], description="Per choice, how many tokens were generated in "
                                               "each section, if a scope names sections.")
    warnings: list[ReceiptWarning] = Field(default=[], description="What was asked for and is rarely meant.")
    rollouts: list[RolloutArm] = Field(default=[], description="Arms of roll-outs at work behind what was named.")
    contrast: ContrastReceipt | None = Field(default=None, description="The weak run, where tokens were chosen by the "
                                             "difference between two.")


@dataclass(frozen=True)
class Outcome:
    """One finished choice as the receipt needs it. `touched`: per intervention, tokens counted by the engine."""

    index: int
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    roles: Sequence[str] | None
    touched: Sequence[Touched]
    decided: Decided
    events: Sequence[Event] = ()
    checks: int | None = None
    switched_off: int | None = None
    sections: Mapping[Section, int] = field(default_factory=dict)
    weak_touched: Sequence[Touched] = ()

    @property
    def weak(self) -> "Outcome | None":
        """The same of its weak run, where there is a contrast."""
        if self.decided.weak is None:
            return None
        return replace(self, touched=self.weak_touched, decided=self.decided.weak, events=())


def receipt(plan: Plan, outcomes: Sequence[Outcome], engine: str, effects: Effects | None = None,
            monitor: Sequence[MonitorReport] = (), graded: Outcomes | None = None) -> Receipt:
    ordered = sorted(outcomes, key=lambda outcome: outcome.index)
    # One look at all tokens of a choice tells of every intervention.
    bits = {o.index: _bits(o) for o in ordered} if plan.report == "tokens" and plan.program is not None else {}
    applied = _applied(plan.planned, plan.program, ordered, bits)
    weak = plan.contrast
    contrast = None if weak is None else ContrastReceipt(alpha=weak.alpha, beta=weak.beta, weak=_applied(
        weak.planned, weak.program, [o.weak for o in ordered if o.weak is not None], {}))
    return Receipt(applied=applied, disabled=plan.disabled is not None, reason=plan.disabled,
                   presets=dict(plan.presets or {}), engine=engine, report=plan.report, effects=effects,
                   outcomes=graded, monitor=list(monitor), guard_checks=[o.checks for o in ordered],
                   switched_off=[o.switched_off for o in ordered],
                   sections=[dict(o.sections) for o in ordered] if plan.program is not None
                   and any(map(names_sections, plan.program.scopes)) else [],
                   warnings=_warnings(plan, applied),
                   rollouts=[RolloutArm(rollout=arm.rollout, target=arm.target, arm=arm.arm, ref=arm.ref)
                             for arm in plan.arms], contrast=contrast)


def _applied(given: Sequence[Planned], program: Program | None, ordered: Sequence[Outcome], bits: Mapping[int, Bits]
             ) -> list[AppliedIntervention]:
    """What a program did. bits: by index of the choice, which interventions touch each token."""
    applied = []
    for j, (planned, compiled) in enumerate(zip(given, program.compiled if program else (), strict=True)):
        facts = compiled.applied
        choices = [ChoiceCounts(index=o.index, prompt=o.touched[j].prompt, generation=o.touched[j].generation,
                                positions=_positions(o, j, bits[o.index]) if o.index in bits else None,
                                guard=_guarded(o, j), gate=_decision(o.decided.gates.get(j)),
                                step=_step(o.touched[j]))
                   for o in ordered]
        applied.append(AppliedIntervention(
            artifact=facts.artifact or "inline", card=facts.card, source=planned.origin, op=facts.op,
            sites=list(facts.sites), layers=list(facts.layers), strength=dict(facts.strength),
            options=dict(facts.options), gate=_gate(compiled.gate),
            tokens=TokenCounts(prompt=sum(c.prompt for c in choices), generation=sum(c.generation for c in choices)),
            choices=choices))
    return applied


def _step(touched: Touched) -> StepSize | None:
    if touched.largest_step is None or touched.mean_step is None:
        return None
    return StepSize(max=touched.largest_step, mean=touched.mean_step, clipped=touched.clipped)


def _warnings(plan: Plan, applied: Sequence[AppliedIntervention]) -> list[ReceiptWarning]:
    found = []
    for j, (item, compiled) in enumerate(zip(applied, plan.program.compiled if plan.program else (), strict=True)):
        multiple = compiled.applied.card_multiple
        if multiple is not None and multiple >= STRONG_MULTIPLE:
            found.append(ReceiptWarning(code="strong", intervention=j, message=f"{item.artifact} is steered with "
                                        f"{multiple:.3g} times its own strength"))
        if plan.planned[j].lowered is not None:
            found.append(ReceiptWarning(code="policy", intervention=j, message=f"{item.artifact}: "
                                        f"{plan.planned[j].lowered}"))
        found += [ReceiptWarning(code="card", intervention=j, message=f"{item.artifact}: {warning}")
                  for warning in compiled.applied.warnings]
        found += [ReceiptWarning(code="massive", intervention=j, message=f"{item.artifact}: {warning}")
                  for warning in compiled.applied.massive]
        clipped = sum(choice.step.clipped for choice in item.choices if choice.step is not None)
        if clipped:
            found.append(ReceiptWarning(code="clipped", intervention=j, message=f"{clipped} steps of {item.artifact} "
                                        "were shortened to the server's limit"))
    return found


def _gate(gate: CompiledGate | None) -> GateReceipt | None:
    if gate is None:
        return None
    return GateReceipt(rule=gate.rule, when=gate.when,
                       conditions=[GateFacts.model_validate(condition.facts()) for condition in gate.conditions])


def _decision(decision: Decision | None) -> GateDecision | None:
    if decision is None:
        return None
    return GateDecision(open=decision.open, scores=[{str(layer): score for layer, score in scores.items()}
                                                    for scores in decision.scores])


def _guarded(outcome: Outcome, j: int) -> list[GuardEvent]:
    return [GuardEvent(token=e.token, factor=e.factor, reason=e.reason, kl=e.kl, repetition=e.repetition)
            for e in outcome.events if e.intervention == j]


def _bits(outcome: Outcome) -> Bits:
    """Which interventions touch each token of prompt and completion."""
    program = outcome.decided.program
    assert program is not None
    touch = program.touch(outcome.prompt_ids, len(outcome.generated_ids), outcome.roles)
    return touch.bits_of([*outcome.prompt_ids, *outcome.generated_ids])


def _positions(outcome: Outcome, j: int, bits: Bits) -> list[int]:
    """Positions that intervention j touched, among as many tokens as the engine says it processed."""
    found, length = np.flatnonzero(bits & np.uint32(1 << j)), len(outcome.prompt_ids)
    prompt, generation = outcome.touched[j].prompt, outcome.touched[j].generation
    in_prompt = found[found < length][:prompt]
    in_generation = found[found >= length][:generation]
    return [*map(int, in_prompt), *map(int, in_generation)]
