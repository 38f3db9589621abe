"""Proof, at start, that every site of the loaded model is reached.

One short prompt is run with a zero vector at every site, and its logits must equal those without any vector bit for
bit. Then it is run in a mixed batch, each row of which has a strong push at another site and layer: the logits of each
row must move, and those of a row without a push must not. What does not move is tried once more. A site at which no
push moves anything is not offered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steering.acting.steerer import Steerer
from steering.language.errors import UnsupportedModel
from steering.language.scope import Scope
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops.base import Row
from steering.programs.program import Applied, Compiled, Program
from steering.residency.bank import Bank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBES_PER_PASS = 64
PROMPT_LENGTH = 4
# Interventions of one program.
BITS = 32
ATTEMPTS = 2


@dataclass(frozen=True)
class SelfTest:
    """What was reached: layers per site, and (site, layer) pairs that were offered by structure but not reached."""

    reached: Mapping[Site, tuple[int, ...]]
    missed: tuple[tuple[Site, int], ...]


@torch.no_grad()
def run_selftest(model: "PreTrainedModel", facts: ModelFacts) -> SelfTest:
    """Probe every offered site of `model`.

    Raises:
        UnsupportedModel: a hook with a zero vector changes the output, or a row without a probe moves.
    """
    keys = [(site, layer) for site, layers in facts.sites.items() for layer in layers]
    _check_idle(model, facts, keys)
    hit: set[tuple[Site, int]] = set()
    for attempt in range(ATTEMPTS):
        left = [key for key in keys if key not in hit]
        # All passes have the same size, so that one untouched pass is the control of all.
        passes = -(-len(left) // PROBES_PER_PASS)
        rows = -(-len(left) // passes) if passes else 0
        plain = _logits(model, _prompt(model, facts, rows + 1), last=1) if rows else torch.empty(0)
        for start in range(0, len(left), rows or 1):
            part = left[start:start + rows]
            moved = _probe(model, facts, part, attempt, plain)
            hit.update(key for key, did in zip(part, moved, strict=True) if did)
    reached: dict[Site, tuple[int, ...]] = {}
    for site in facts.sites:
        layers = tuple(layer for other, layer in keys if other == site and (other, layer) in hit)
        if layers:
            reached[site] = layers
    return SelfTest(reached, tuple(key for key in keys if key not in hit))


def narrowed(facts: ModelFacts, result: SelfTest) -> ModelFacts:
    """Facts that offer only what was reached."""
    return replace(facts, sites=dict(result.reached))


@torch.no_grad()
def _check_idle(model: "PreTrainedModel", facts: ModelFacts, keys: Sequence[tuple[Site, int]]) -> None:
    """Check that hooks which add nothing leave the output as it was, bit for bit. Two rows are enough to show it."""
    ids = _prompt(model, facts, 2)
    plain = _logits(model, ids)
    for start in range(0, len(keys), BITS):
        zeros = Program(tuple(_compiled({key: _zero(facts, key[0])}) for key in keys[start:start + BITS]))
        if not torch.equal(plain, _steered(model, ids, [zeros] * len(ids))):
            raise UnsupportedModel(f"{facts.model_id}: a hook that adds nothing changes the output", param="model")


@torch.no_grad()
def _probe(model: "PreTrainedModel", facts: ModelFacts, keys: Sequence[tuple[Site, int]], attempt: int,
           plain: torch.Tensor) -> list[bool]:
    """Whether a push at each key moves the logits after the prompt. plain: the untouched logits, of at least one row
    more than there are keys, because the last row is the control."""
    generator = torch.Generator().manual_seed(attempt)
    programs: list[Program | None] = [Program((_compiled({key: _push(facts, key[0], attempt, generator)}),))
                                      for key in keys]
    # The rows behind the last probe are the control: their slot stays 0.
    programs += [None] * (len(plain) - len(keys))
    steered = _steered(model, _prompt(model, facts, len(plain)), programs, last=1)
    if not torch.allclose(plain[-1], steered[-1], rtol=1e-3, atol=1e-3):
        raise UnsupportedModel(f"{facts.model_id}: steering one request changes another", param="model")
    # Rounding may differ by row; a probe must move the logits by far more.
    floor = 1e-3 * plain.abs().max()
    return [bool((steered[i] - plain[i]).abs().max() > floor) for i in range(len(keys))]


def _prompt(model: "PreTrainedModel", facts: ModelFacts, rows: int) -> torch.Tensor:
    """The same short prompt in every row, `[rows, PROMPT_LENGTH]`."""
    prompt = torch.randint(facts.vocab_size, (1, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))
    return prompt.expand(rows, -1).to(model.device)


def _steered(model: "PreTrainedModel", ids: torch.Tensor, programs: Sequence[Program | None], last: int = 0
             ) -> torch.Tensor:
    """Logits with program i acting on row i; see `_logits`."""
    bank = Bank(len(programs), model.device)
    steerer = Steerer(model, bank)
    held = iter(bank.hold([program for program in programs if program is not None]))
    slots = [0 if program is None else next(held) for program in programs]
    bits = [0 if program is None else program.acting for program in programs]
    plan = steerer.plan(np.repeat(np.array(slots, dtype=np.int32), ids.shape[1]),
                        np.repeat(np.array(bits, dtype=np.uint32), ids.shape[1]))
    try:
        with steerer.acting(plan):
            return _logits(model, ids, last)
    finally:
        steerer.detach()


def _logits(model: Any, ids: torch.Tensor, last: int = 0) -> torch.Tensor:
    """At the last `last` tokens of each row, 0: at all. On a large vocabulary they cost as much as many layers."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=last).logits.float()
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
