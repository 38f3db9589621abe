"""Proof, at start, that every site of the loaded model is reached.

A mixed batch of one short prompt is run three times: as it is, with a zero vector at every site (must be the same bit
for bit), and with a strong probe at a different (site, layer) in every row (each row's logits must move, and the rows
without a probe must not). A site whose probe moves nothing is not offered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steering.bank import Bank
from steering.errors import UnsupportedModel
from steering.facts import ModelFacts
from steering.ops.base import Row
from steering.program import Applied, Compiled, Program
from steering.spec import Scope, Site
from steering.steerer import Steerer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBES_PER_PASS = 64
PROMPT_LENGTH = 6


@dataclass(frozen=True)
class SelfTest:
    """What was reached: layers per site, and (site, layer) pairs that were offered by structure but not reached."""

    reached: Mapping[Site, tuple[int, ...]]
    missed: tuple[tuple[Site, int], ...]


def run_selftest(model: "PreTrainedModel", facts: ModelFacts) -> SelfTest:
    """Probe every offered site of `model`.

    Raises:
        UnsupportedModel: a hook with a zero vector changes the output, or a row without a probe moves.
    """
    keys = [(site, layer) for site, layers in facts.sites.items() for layer in layers]
    moved: list[bool] = []
    for start in range(0, len(keys), PROBES_PER_PASS):
        moved += _probe(model, facts, keys[start:start + PROBES_PER_PASS])
    hit = [key for key, ok in zip(keys, moved, strict=True) if ok]
    reached: dict[Site, tuple[int, ...]] = {}
    for site in facts.sites:
        layers = tuple(layer for other, layer in hit if other == site)
        if layers:
            reached[site] = layers
    return SelfTest(reached, tuple(key for key, ok in zip(keys, moved, strict=True) if not ok))


def narrowed(facts: ModelFacts, result: SelfTest) -> ModelFacts:
    """Facts that offer only what was reached."""
    return replace(facts, sites=dict(result.reached))


@torch.no_grad()
def _probe(model: "PreTrainedModel", facts: ModelFacts, keys: Sequence[tuple[Site, int]]) -> list[bool]:
    # The row behind the last probe is the control: its slot stays 0.
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(facts.vocab_size, (1, PROMPT_LENGTH), generator=generator)
    ids = prompt.expand(len(keys) + 1, -1).to(model.device)
    plain = _logits(model, ids)
    zeros = Program(tuple(_compiled({key: _zero(facts, key[0])}) for key in keys[:32]))
    rest = Program(tuple(_compiled({key: _zero(facts, key[0])}) for key in keys[32:]))
    for program in (zeros, rest):
        if program.compiled and not torch.equal(plain, _steered(model, ids, [program] * len(ids))):
            raise UnsupportedModel(f"{facts.model_id}: a hook that adds nothing changes the output", param="model")
    moved = [False] * len(keys)
    for attempt in range(2):
        programs: list[Program | None] = [Program((_compiled({key: _push(facts, key[0], attempt, generator)}),))
                                          for key in keys]
        steered = _steered(model, ids, [*programs, None])
        if not torch.allclose(plain[-1], steered[-1], rtol=1e-3, atol=1e-3):
            raise UnsupportedModel(f"{facts.model_id}: steering one request changes another", param="model")
        # Rounding may differ by row; a probe must move the logits by far more.
        floor = 1e-3 * plain.abs().max()
        moved = [was or bool((steered[i] - plain[i]).abs().max() > floor) for i, was in enumerate(moved)]
    return moved


def _steered(model: "PreTrainedModel", ids: torch.Tensor, programs: Sequence[Program | None]) -> torch.Tensor:
    """Logits with program i acting on row i."""
    bank = Bank(len(programs), model.device)
    steerer = Steerer(model, bank)
    slots = [0 if program is None else bank.acquire(program) for program in programs]
    bits = [0 if program is None else program.acting for program in programs]
    plan = steerer.plan(np.repeat(np.array(slots, dtype=np.int32), ids.shape[1]),
                        np.repeat(np.array(bits, dtype=np.uint32), ids.shape[1]))
    try:
        with steerer.acting(plan):
            return _logits(model, ids)
    finally:
        steerer.detach()


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _compiled(rows: Mapping[tuple[Site, int], Row]) -> Compiled:
    return Compiled("add", Scope(), rows, Applied(None, "add", (), (), {}, {}))


def _zero(facts: ModelFacts, site: Site) -> Row:
    width = facts.width(site)
    if site == "router":
        return Row("route", {"bias": torch.zeros(width), "gate": torch.ones(width), "force": torch.zeros(width),
                             "renormalise": torch.tensor(0.0)})
    return Row("add", {"delta": torch.zeros(width)})


def _push(facts: ModelFacts, site: Site, attempt: int, generator: torch.Generator) -> Row:
    """A change that must show. At the router: force one expert, or in the second attempt another one."""
    width = facts.width(site)
    if site == "router":
        force = torch.zeros(width)
        force[attempt % width] = 1.0
        return Row("route", {"bias": torch.zeros(width), "gate": torch.ones(width), "force": force,
                             "renormalise": torch.tensor(0.0)})
    direction = torch.randn(width, generator=generator)
    return Row("add_norm_match", {"delta": direction / direction.norm()})
