"""Hooks of a loaded model that carry out the plan of the step at hand."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from steering.acting.containment import UNLIMITED, StepLimit, contain
from steering.acting.record import Record
from steering.models.routers import attach_router, router_rule
from steering.models.routing import RouterRule, Routing, select
from steering.models.taps import attach
from steering.ops.kernel import get_kernel
from steering.ops.segments import Segmented
from steering.programs.touch import Bits
from steering.residency.plan import Slots, Stage, StepPlan, plan_step
from steering.residency.row_table import Key, RowTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel



class Steerer:
    """Steers a model: one hook for every (site, layer) that a resident program uses, none elsewhere.

    The thread that runs the model calls `plan` before a forward pass and `acting` around it. While nothing in the
    batch is steered at a site, its hook hands the activation back as it came.
    """

    def __init__(self, model: "PreTrainedModel", table: RowTable) -> None:
        self.model = model
        self.table = table
        self._hooks: dict[Key, RemovableHandle] = {}
        self._current: StepPlan = {}
        self._record = Record(UNLIMITED)
        self._last: tuple[int, bytes, bytes] | None = None
        self._last_plan: StepPlan = {}

    def plan(self, slots: Slots, bits: Bits) -> StepPlan:
        """The plan for a flat batch; the last one is used again where nothing changed, as in steady decoding."""
        state = (self.table.version, slots.tobytes(), bits.tobytes())
        if state != self._last:
            self._last_plan = plan_step(self.table, slots, bits)
            self._last = state
        for key in self._last_plan:
            if key not in self._hooks:
                self._hooks[key] = self._attach(key)
        return self._last_plan

    @contextmanager
    def acting(self, plan: StepPlan, limit: StepLimit = UNLIMITED) -> Iterator[Record]:
        """Carry out `plan` in the forward passes of the block, and record each step."""
        self._current, self._record = plan, Record(limit)
        try:
            yield self._record
        finally:
            self._current = {}

    def detach(self) -> None:
        """Take every hook off the model."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self._last = None

    def _attach(self, key: Key) -> RemovableHandle:
        site, layer = key
        if site == "router":
            rule = router_rule(self.model, layer)
            return attach_router(self.model, layer, self._router_edit(key, rule))
        return attach(self.model, site, layer, self._edit(key), first=True)

    def _edit(self, key: Key) -> Callable[[Tensor], Tensor]:
        def edit(h: Tensor) -> Tensor:
            for stage in self._current.get(key, ()):
                h, step = measured_stage(h, stage, self._record.limit)
                self._record.note(stage, step)
            return h

        return edit

    def _router_edit(self, key: Key, rule: RouterRule) -> Callable[[Tensor, Routing], Routing | None]:
        def edit(hidden: Tensor, routing: Routing) -> Routing | None:
            stages = self._current.get(key)
            if not stages:
                return None
            routed, steps = measured_route(routing, stages, rule)
            for stage, step in zip(stages, steps, strict=True):
                self._record.note(stage, step)
            return routed

        return edit


def apply_stage(h: Tensor, stage: Stage) -> Tensor:
    """`h [T, width]` with the stage's kernel carried out on its tokens; see `measured_stage`."""
    return measured_stage(h, stage, UNLIMITED)[0]


def measured_stage(h: Tensor, stage: Stage, limit: StepLimit) -> tuple[Tensor, Tensor]:
    """`h [T, width]` with the stage's kernel carried out on its tokens, in float32, returned in h's dtype, and the
    relative step of each of them, `[n]`; see `contain`."""
    before = h if stage.tokens is None else h.index_select(0, stage.tokens)
    after, step = contain(before, _carried_out(before.float(), stage), limit)
    return after if stage.tokens is None else h.index_copy(0, stage.tokens, after), step


def _carried_out(h: Tensor, stage: Stage) -> Tensor:
    """The kernel on `h [n, width]`, float32."""
    return get_kernel(stage.pool.kernel)(h, Segmented(stage.pool.tensors, stage.rows, stage.segments))


def route_stages(routing: Routing, stages: Sequence[Stage], rule: RouterRule) -> Routing:
    """Routing with all router interventions carried out; see `measured_route`."""
    return measured_route(routing, stages, rule)[0]


def measured_route(routing: Routing, stages: Sequence[Stage], rule: RouterRule) -> tuple[Routing, list[Tensor]]:
    """Routing with all router interventions carried out, and for each stage one number per token, `[n]`: infinity where
    the intervention would have made a token's weights not finite, which then keep their value, and NaN elsewhere,
    because routers have no relative step.

    Edits before the choice (bias, force) of all stages act first, then edits of the chosen weights, each in order: the
    choice is made once. Tokens of no stage keep the model's own routing, bit for bit.
    """
    logits = routing.logits
    bias = torch.zeros_like(logits, dtype=torch.float32)
    force = torch.zeros_like(logits, dtype=torch.bool)
    reselect = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for stage in stages:
        rows = {name: tensor[stage.rows] for name, tensor in stage.pool.tensors.items()}
        tokens = _tokens(stage, logits)
        bias[tokens] += rows["bias"]
        force[tokens] |= rows["force"] > 0
        reselect[tokens] |= (rows["bias"] != 0).any(-1) | (rows["force"] > 0).any(-1)
    weights, experts = routing.weights.clone(), routing.experts.clone()
    if bool(reselect.any()):
        chosen = select(logits[reselect], rule, logit_bias=bias[reselect], force=force[reselect])
        weights[reselect], experts[reselect] = chosen.weights.to(weights.dtype), chosen.experts
    steps = []
    for stage in stages:
        tokens = _tokens(stage, logits)
        rows = {name: tensor[stage.rows] for name, tensor in stage.pool.tensors.items()}
        before = weights[tokens].float()
        after = before * rows["gate"].gather(1, experts[tokens])
        total = after.sum(-1, keepdim=True)
        renormalised = after * (before.sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0))
        wanted = (rows["renormalise"] > 0).unsqueeze(-1) & (total > 0)
        edited = torch.where(wanted, renormalised, after).to(weights.dtype)
        broken = ~edited.isfinite().all(-1) & before.isfinite().all(-1)
        weights[tokens] = torch.where(broken.unsqueeze(-1), before.to(weights.dtype), edited)
        steps.append(torch.where(broken, torch.inf, torch.nan))
    return Routing(logits, weights, experts), steps


def _tokens(stage: Stage, like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device) if stage.tokens is None else stage.tokens
