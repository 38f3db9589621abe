"""Gates of a request: what the probes read in each prompt, and the program that follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from server.engines.base import Engine
from server.engines.data import Captured, CaptureRequest
from server.requests.plan import Plan
from server.text.prompts import Prompt
from steering.language.errors import TrimtabError
from steering.language.vocabulary import Site
from steering.programs.gate import CompiledGate, Decision
from steering.programs.program import Program


@dataclass(frozen=True)
class Decided:
    """One prompt's program and what its gates decided, by intervention. weak: the same of the weak run, where there is
    a contrast."""

    program: Program | None
    gates: dict[int, Decision]
    weak: "Decided | None" = None


async def decide(plan: Plan, prompts: Sequence[Prompt], engine: Engine) -> list[Decided]:
    """Decide the gates of a plan for every prompt: one pass over each, by the untouched model.

    Raises:
        TrimtabError: the prompt cannot be read. The request fails then, because nobody knows whether the intervention
            has to act.
    """
    texts = [prompt.token_ids for prompt in prompts]
    found = await decide_program(plan.program, texts, engine)
    if plan.contrast is None:
        return found
    try:
        weak = await decide_program(plan.contrast.program, texts, engine)
    except TrimtabError as error:
        raise error.at("contrast", "weak") if error.path else error from None
    return [replace(one, weak=other) for one, other in zip(found, weak, strict=True)]


async def decide_program(program: Program | None, prompts: Sequence[Sequence[int]], engine: Engine) -> list[Decided]:
    """As `decide`, for a program by itself and prompts as token ids."""
    if program is None or not program.gates:
        return [Decided(program, {}) for _ in prompts]
    gates = list(program.gates.values())
    sites = _sites(gates)
    last = all(condition.pool == "last" for gate in gates for condition in gate.conditions)
    found = await engine.capture([CaptureRequest(token_ids, sites, [-1] if last else None) for token_ids in prompts])
    decided = []
    programs: dict[frozenset[int], Program] = {}
    for captured in found:
        decisions = {j: _decision(j, gate, captured) for j, gate in program.gates.items()}
        closed = frozenset(j for j, decision in decisions.items() if not decision.open)
        if closed not in programs:
            programs[closed] = program.decided(closed)
        decided.append(Decided(programs[closed], decisions))
    return decided


def _decision(index: int, gate: CompiledGate, captured: Captured) -> Decision:
    try:
        return gate.decide(captured)
    except TrimtabError as error:
        raise error.at("interventions", index) from None


def _sites(gates: Sequence[CompiledGate]) -> dict[Site, list[int]]:
    """The sites and layers that any of them reads."""
    wanted: dict[Site, set[int]] = {}
    for gate in gates:
        for condition in gate.conditions:
            wanted.setdefault(condition.reader.site, set()).update(condition.reader.layers)
    return {site: sorted(layers) for site, layers in wanted.items()}
