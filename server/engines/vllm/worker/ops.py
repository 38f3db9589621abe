"""The opaque ops: everything the compiled graph does not do itself, at a cost only where it is used.

`trimtab::act(h, residual, taken, key)` stands once in the graph for each hooked place, `trimtab::route` for each
router. They change their arguments in place where a program of the step has stages there, and copy activations that are
asked for. `taken` are the steps that the graph itself took at the place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server.engines.vllm.wire import Key
from server.engines.vllm.worker.stage import held_by, poisoned
from server.engines.vllm.worker.steps import Steps
from steering.acting.steerer import measured_route, measured_stage
from steering.models.routing import RouterRule, Routing
from steering.residency.plan import Stage


@dataclass(frozen=True)
class Split:
    """How the width of a place is split among the ranks of a tensor-parallel group. size 1: it is not."""

    rank: int
    size: int

    def columns(self, width: int) -> slice:
        """Columns of the full width that this rank has."""
        part = width // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True)
class Actor:
    """What `key` of an op stands for; `rule` at routers only."""

    steps: Steps
    key: Key
    split: Split
    rule: RouterRule | None = None


# Keys are baked into compiled graphs, so they count up from 0 in the order in which places are hooked.
_ACTORS: list[Actor] = []


def register(actor: Actor) -> int:
    """The number of a place for `trimtab::act`."""
    _ACTORS.append(actor)
    return len(_ACTORS) - 1


def _act(h: Tensor, residual: Tensor | None, taken: Tensor | None, key: int) -> None:
    actor = _ACTORS[key]
    steps = actor.steps
    if not steps.busy:
        return
    if taken is not None:
        steps.note_graph(actor.key, taken)
    stages = steps.stages(actor.key)
    wanted = steps.wants(actor.key)
    if not stages and not wanted:
        return
    if actor.split.size > 1:
        _act_split(actor, h, stages, wanted)
        return
    before = h.float() if residual is None else h.float() + residual.float()
    after = _carried_out(steps, before, stages, h.dtype)
    if stages:
        # The stream is the sum of two halves; the change goes to one of them, and is 0 where nothing acts.
        h.copy_(after if residual is None else h.float() + (after - before))
    if wanted:
        steps.capture(actor.key, after)


def _act_split(actor: Actor, h: Tensor, stages: Sequence[Stage], wanted: bool) -> None:
    from vllm.distributed import tensor_model_parallel_all_gather

    whole = tensor_model_parallel_all_gather(h.contiguous(), dim=-1).float()
    after = _carried_out(actor.steps, whole, stages, h.dtype)
    if stages:
        h.copy_(after[:, actor.split.columns(whole.shape[1])])
    if wanted:
        actor.steps.capture(actor.key, after)


def _carried_out(steps: Steps, h: Tensor, stages: Sequence[Stage], dtype: torch.dtype) -> Tensor:
    """`h [T, width]` (float32) with the stages carried out in what `dtype` can hold, and their steps noted."""
    for stage in stages:
        padded = _real_tokens(stage, len(h))
        after, step = measured_stage(h, padded, steps.limit_of(stage))
        if dtype != torch.float32:
            rows = slice(None) if padded.tokens is None else padded.tokens
            held = held_by(after[rows], dtype).isfinite().all(-1)
            after[rows] = torch.where(held.unsqueeze(-1), after[rows], h[rows])
            step = torch.where(held, step, torch.inf)
        steps.note(stage, step)
        if steps.graph.poisoning:
            rows = slice(None) if padded.tokens is None else padded.tokens
            after[rows] = poisoned(after[rows], step.unsqueeze(-1), steps.limit_of(stage))
        h = after
    return h


def _route(logits: Tensor, weights: Tensor, experts: Tensor, key: int) -> None:
    actor = _ACTORS[key]
    steps = actor.steps
    if not steps.busy:
        return
    given = steps.stages(actor.key)
    stages = [_real_tokens(stage, len(logits)) for stage in given]
    if stages:
        assert actor.rule is not None
        routing, taken = measured_route(Routing(logits, weights, experts.long()), stages, actor.rule)
        weights.copy_(routing.weights)
        experts.copy_(routing.experts)
        for stage, step in zip(given, taken, strict=True):
            steps.note(stage, step)
    if steps.wants(actor.key):
        steps.capture(actor.key, logits)


def _real_tokens(stage: Stage, num_rows: int) -> Stage:
    """The stage with its tokens spelled out where rows of padding follow the batch: None stands for all real ones."""
    if stage.tokens is not None or len(stage.rows) == num_rows:
        return stage
    return replace(stage, tokens=torch.arange(len(stage.rows), device=stage.rows.device))


_LIBRARY = torch.library.Library("trimtab", "DEF")
_LIBRARY.define("act(Tensor(a!) h, Tensor? residual, Tensor? taken, int key) -> ()")
_LIBRARY.define("route(Tensor logits, Tensor(a!) weights, Tensor(b!) experts, int key) -> ()")
_LIBRARY.impl("act", _act, "CompositeExplicitAutograd")
_LIBRARY.impl("route", _route, "CompositeExplicitAutograd")


@torch.library.register_fake("trimtab::act", lib=_LIBRARY)
def _act_fake(h: Tensor, residual: Tensor | None, taken: Tensor | None, key: int) -> None:
    return None


@torch.library.register_fake("trimtab::route", lib=_LIBRARY)
def _route_fake(logits: Tensor, weights: Tensor, experts: Tensor, key: int) -> None:
    return None
