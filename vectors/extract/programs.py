"""Interventions that recipes try out on the model, compiled like any request's."""

from collections.abc import Mapping
from typing import Any

import torch

from steering.artifacts.payload import Kind, Payload
from steering.artifacts.source import Resolved, Source
from steering.language.intervention import Intervention
from steering.language.scope import PromptSelection, Scope
from steering.language.strength import Strength
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from steering.programs.compiler import compile_program
from steering.programs.program import Program

# Every prediction: the last prompt token, and each generated one as it is fed back.
LAST = Scope(prompt=PromptSelection(positions=[-1]), generation="all")
# What the model says next, and nothing after that: one forward pass at the last prompt token.
NEXT = Scope(prompt=PromptSelection(positions=[-1]), generation="none")
EVERYWHERE = Scope()


def program_of(facts: ModelFacts, kind: Kind, op: Op, site: Site, numbers: Mapping[int, Mapping[str, torch.Tensor]], *,
               scope: Scope = LAST, options: Mapping[str, Any] | None = None, strength: float = 1.0) -> Program:
    """One intervention at every layer that has numbers.

    Raises:
        TrimtabError: as the compiler.
    """
    payload = Payload.build(kind, {n: {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
                                   for n, tensors in numbers.items()})
    source = Source(ref="trial", digest="", payload=payload, op=op, site=site, options=options or {})
    intervention = Intervention(artifact="trial", scope=scope, strength=Strength(value=strength))
    return compile_program([Resolved(intervention, source)], facts)


def adding(facts: ModelFacts, site: Site, layer: int, vector: torch.Tensor, scope: Scope = LAST) -> Program:
    """`vector [width]` added at one layer."""
    return program_of(facts, "vector", "add", site, {layer: {"vector": vector}}, scope=scope)
