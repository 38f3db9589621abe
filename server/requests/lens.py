"""Vocabulary lenses: what the model would say if its last layer were reached with an activation of an earlier one.

Logit lens: softmax(W_U norm(h)). Tuned lens: the same of scale * h + shift, a diagonal map per layer that was fitted to
foresee the last layer's activation (Nadaf 2026, arXiv 2604.02608). The unembedding is the engine's own: activations are
put in the place of the last layer's, by the op `patch`, in a pass over as many tokens. So every engine of the contract
has lenses, and soft-capped or scaled logits are read as the model makes them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from server.engines.base import Engine
from server.engines.data import CaptureRequest
from server.threads import in_thread
from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import SteeringOverflow
from steering.language.fields import MAX_INTERVENTIONS
from steering.language.intervention import Intervention
from steering.language.scope import PromptSelection, Scope
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.compiler import compile_program
from steering.programs.program import Program

T = TypeVar("T")
SITE: Site = "resid_post"


@dataclass(frozen=True)
class Map:
    """A tuned lens: layer -> scale, shift `[d_model]` each. `ref` names it."""

    ref: str
    layers: Mapping[int, Mapping[str, torch.Tensor]]

    def applied(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """`h [n, d_model]` as the last layer would have it. The last layer itself is not mapped."""
        if layer not in self.layers:
            return h
        return h * self.layers[layer]["scale"] + self.layers[layer]["shift"]


@dataclass(frozen=True)
class Seen(Generic[T]):
    """Of one text: layer -> what was read at each position, positions counted from the start."""

    positions: Sequence[int]
    layers: Mapping[int, Sequence[T]]


async def look(engine: Engine, token_ids: Sequence[int], layers: Sequence[int], positions: Sequence[int],
               program: Program | None, tuned: Map | None, roles: Sequence[str] | None = None, *,
               read: Callable[[torch.Tensor], Sequence[T]]) -> Seen[T]:
    """The lens at every layer and position of a text that runs under `program`.

    Args:
        read: what is wanted of some rows of log-probabilities `[n, vocab_size]`, one entry each; called in a thread.
            Only a few rows are ever held at once.

    Raises:
        TrimtabError: as the engine.
    """
    request = CaptureRequest(token_ids, {SITE: layers}, positions, roles=roles)
    found = (await engine.capture([request], program))[0][SITE]
    mapped = {layer: found[layer] if tuned is None else tuned.applied(layer, found[layer]) for layer in layers}
    for layer, h in mapped.items():
        if not bool(h.isfinite().all()):
            raise SteeringOverflow(f"the lens {'logit' if tuned is None else tuned.ref} makes values that are not "
                                   f"finite of layer {layer}'s activations", param="lens", fix="Use the logit lens.")
    hidden = torch.cat([mapped[layer] for layer in layers])
    entries: list[T] = []
    for rows in hidden.split(min(MAX_INTERVENTIONS, engine.facts.context_length)):
        entries += await _unembedded(engine, rows, read)
    count = len(positions)
    return Seen([n % len(token_ids) for n in positions],
                {layer: entries[i * count:(i + 1) * count] for i, layer in enumerate(layers)})


async def _unembedded(engine: Engine, rows: torch.Tensor, read: Callable[[torch.Tensor], Sequence[T]]) -> Sequence[T]:
    """What `read` makes of the log-probabilities of the next token for last-layer activations `rows [n, d_model]`."""
    program = await in_thread(lambda: _placing(rows, engine.facts))
    # Which tokens these are does not matter, because the program puts other activations in their place.
    try:
        full = (await engine.score([0] * len(rows), program, full=True)).full
    except SteeringOverflow as error:
        # The program is the server's own; its interventions are none of the request's.
        raise SteeringOverflow("what the lens puts in the last layer's place makes logits that are not finite",
                               param="lens") from error
    if full is None:
        raise RuntimeError("the engine gave no log-probabilities though they were asked for")
    return await in_thread(lambda: read(full[:len(rows)].float().cpu()))


def _placing(rows: torch.Tensor, facts: ModelFacts) -> Program:
    """A program that puts row i in the place of the last layer's activation at position i."""
    layer = facts.num_layers - 1
    resolved = []
    for i, row in enumerate(rows):
        # The payload is made without the library's checks, because here a row of zeros is allowed.
        payload = Payload("vector", {layer: {"vector": row.float()}})
        source = Source(f"row-{i}", "", payload, "patch", SITE, facts.model_id, facts.fingerprint)
        scope = Scope(prompt=PromptSelection(positions=[i]), generation="none")
        resolved.append(Resolved(Intervention(artifact="row", scope=scope), source))
    return replace(compile_program(resolved, facts), limited=False)
