"""Vocabulary lenses: what the model would say if its last layer were reached with an activation of an earlier one.

Logit lens: softmax(W_U norm(h)). Tuned lens: the same of scale * h + shift, a diagonal map per layer that was fitted to
foresee the last layer's activation (methods/01). The unembedding is the engine's own: activations are put in the place
of the last layer's, by the op `patch`, in a pass over as many tokens. So every engine of the contract has lenses, and
soft-capped or scaled logits are read as the model makes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from server.engines.base import CaptureRequest, Engine
from steering.compiler import compile_program
from steering.errors import SteeringOverflow
from steering.facts import ModelFacts
from steering.payload import Payload
from steering.program import Program
from steering.source import Resolved, Source
from steering.spec import MAX_INTERVENTIONS, Intervention, PromptSelection, Scope, Site

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
class Seen:
    """Of one text: layer -> log-probabilities `[num_positions, vocab_size]`, positions counted from the start."""

    positions: Sequence[int]
    layers: Mapping[int, torch.Tensor]


async def look(engine: Engine, token_ids: Sequence[int], layers: Sequence[int], positions: Sequence[int],
               program: Program | None, tuned: Map | None, roles: Sequence[str] | None = None) -> Seen:
    """The lens at every layer and position of a text that runs under `program`.

    Raises:
        TrimtabError: as the engine.
    """
    request = CaptureRequest(token_ids, {SITE: layers}, positions, roles=roles)
    found = (await engine.capture([request], program))[0][SITE]
    rows = {layer: found[layer] if tuned is None else tuned.applied(layer, found[layer]) for layer in layers}
    for layer, mapped in rows.items():
        if not bool(mapped.isfinite().all()):
            raise SteeringOverflow(f"the lens {'logit' if tuned is None else tuned.ref} makes values that are not "
                                   f"finite of layer {layer}'s activations", param="lens", fix="Use the logit lens.")
    logprobs = await unembed(engine, torch.cat([rows[layer] for layer in layers]))
    parts = logprobs.split(len(positions))
    return Seen([n % len(token_ids) for n in positions], dict(zip(layers, parts, strict=True)))


async def unembed(engine: Engine, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[n, vocab_size]` of the next token for last-layer activations `hidden [n, d_model]`."""
    parts = []
    for rows in hidden.split(min(MAX_INTERVENTIONS, engine.facts.context_length)):
        # Whatever tokens these are: nothing of them is left.
        try:
            scores = await engine.score([0] * len(rows), _placing(rows, engine.facts), full=True)
        except SteeringOverflow as error:
            # The program is the server's own; its interventions are none of the request's.
            raise SteeringOverflow("what the lens puts in the last layer's place makes logits that are not finite",
                                   param="lens") from error
        if scores.full is None:
            raise RuntimeError("the engine gave no log-probabilities though they were asked for")
        parts.append(scores.full[:len(rows)].float().cpu())
    return torch.cat(parts)


def _placing(rows: torch.Tensor, facts: ModelFacts) -> Program:
    """A program that puts row i in the place of the last layer's activation at position i."""
    layer = facts.num_layers - 1
    resolved = []
    for i, row in enumerate(rows):
        # Zero is no vector to the library, and nothing here: it is what a stream of zeros would be.
        payload = Payload("vector", {layer: {"vector": row.float()}})
        source = Source(f"row-{i}", "", payload, "patch", SITE, facts.model_id, facts.fingerprint)
        scope = Scope(prompt=PromptSelection(positions=[i]), generation="none")
        resolved.append(Resolved(Intervention(artifact="row", scope=scope), source))
    return replace(compile_program(resolved, facts), limited=False)
