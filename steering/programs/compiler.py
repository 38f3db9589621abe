"""From a spec to a program for one loaded model. What cannot be applied is refused here, before anything runs.

Each intervention passes through the same steps, once and in this order: what is done and where (`choices`), with which
numbers at which layers (`numbers`), how strongly (`strengths`), under which condition (`gate`). Then the op makes a row
of numbers for each site and layer.
"""

from collections.abc import Mapping, Sequence

import torch

from steering.artifacts.source import Resolved, scope_of
from steering.language.errors import InvalidSpec, ProgramTooLarge, TrimtabError
from steering.language.fields import MAX_INTERVENTIONS
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops.base import Place, Row
from steering.programs.choices import Chosen, choose
from steering.programs.gate import CompiledGate, check_token_gate, compile_gate, gated_row
from steering.programs.massive import massive_warnings
from steering.programs.numbers import Numbers, numbers_of
from steering.programs.program import Applied, Compiled, Program
from steering.programs.strengths import Scales, scales_of

# Infinity means "no bound" in these, and "never chosen" at the router.
_UNBOUNDED: Mapping[str, tuple[str, ...]] = {"clamp": ("low", "high"), "route": ("bias",), "sae": ("low",),
                                               "sae_topk": ("low",), "sae_whole": ("low",), "keep_over": ("cut",)}


def compile_program(resolved: Sequence[Resolved], facts: ModelFacts, *, most_numbers: int | None = None) -> Program:
    """Compile interventions in order.

    Args:
        most_numbers: how many the program may have, at all layers together. A step reads each of them once, and each
            touched token is multiplied with it.

    Raises:
        ProgramTooLarge: it has more. Refused at the intervention that goes over it, before the next is compiled.
        TrimtabError: typed, whose `path` begins with `("interventions", i)`.
    """
    if len(resolved) > MAX_INTERVENTIONS:
        raise InvalidSpec(f"{len(resolved)} interventions in all, at most {MAX_INTERVENTIONS} are allowed",
                          param="interventions")
    compiled: list[Compiled] = []
    numbers = 0
    for i, item in enumerate(resolved):
        try:
            compiled.append(_compile_one(item, facts))
            numbers += compiled[-1].numbers
            if most_numbers is not None and numbers > most_numbers:
                raise ProgramTooLarge(f"the spec has {numbers} numbers up to this intervention, at all its layers; "
                                      f"this server allows {most_numbers}",
                                      fix="Act at fewer layers, or with a lower rank.")
        except TrimtabError as error:
            if item.source is not None and error.path[:1] == ("inline",):
                # Ops do not know where their numbers come from.
                error.about("artifact")
            raise error.at("interventions", i) from None
    return Program(tuple(compiled))


def _compile_one(item: Resolved, facts: ModelFacts) -> Compiled:
    chosen = choose(item, facts)
    numbers = numbers_of(item, chosen, facts)
    scales = scales_of(item, chosen, numbers, facts)
    gate = compile_gate(item.intervention.gate, item.probes, facts)
    rows = _rows(chosen, numbers, scales, gate, facts)
    scope = scope_of(item.intervention, item.source)
    return Compiled(chosen.operation.name, scope, rows,
                    _applied(item, chosen, numbers, scales, massive_warnings(rows, scope, facts)), gate)


def _rows(chosen: Chosen, numbers: Numbers, scales: Scales, gate: CompiledGate | None, facts: ModelFacts
          ) -> dict[tuple[Site, int], Row]:
    per_token = check_token_gate(gate, chosen.sites) if gate is not None and gate.when == "token" else None
    rows: dict[tuple[Site, int], Row] = {}
    for layer, tensors in numbers.by_layer.items():
        scale = scales.by_layer[layer]
        for site in chosen.sites:
            # An intervention of strength 0 makes no row, even if its op knows no degrees, but its numbers are checked
            # like all others.
            row = chosen.operation.row(tensors, chosen.options, Place(facts, site, layer, scale or 1.0))
            _check_finite(row)
            if per_token is not None:
                row = gated_row(row, per_token, layer)
            if scale != 0.0:
                rows[site, layer] = row
    return rows


def _applied(item: Resolved, chosen: Chosen, numbers: Numbers, scales: Scales, massive: tuple[str, ...]) -> Applied:
    source, stated = item.source, scales.stated
    return Applied(
        artifact=None if source is None else source.ref,
        card=None if source is None else source.card,
        op=chosen.operation.name,
        sites=chosen.sites,
        layers=numbers.layers,
        strength={"value": stated.value, "unit": stated.unit,
                  "scale": {str(layer): scale for layer, scale in scales.by_layer.items()}},
        options=chosen.options.model_dump(),
        card_kl=scales.expected_kl,
        card_multiple=scales.multiple,
        warnings=() if source is None else source.warnings,
        massive=massive,
    )


def _check_finite(row: Row) -> None:
    for name, tensor in row.tensors.items():
        if bool(torch.isnan(tensor).any()) or (name not in _UNBOUNDED.get(row.kernel, ())
                                               and bool(torch.isinf(tensor).any())):
            raise InvalidSpec("the strength is too large: numbers overflow", param="strength")
