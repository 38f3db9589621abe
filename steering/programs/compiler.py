"""Spec + artifacts + model facts -> program. What cannot be applied is refused here, before anything runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steering.artifacts.dose import Calibrated, canonical, canonical_scope
from steering.artifacts.payload import Payload
from steering.artifacts.source import Resolved, Source
from steering.language.errors import (
    ArtifactMismatch,
    InvalidSpec,
    NotCalibrated,
    ProgramTooLarge,
    TrimtabError,
    UnsupportedSite,
)
from steering.language.fields import MAX_INTERVENTIONS
from steering.language.intervention import Intervention
from steering.language.options import OPTIONS
from steering.language.scope import Scope
from steering.language.strength import BareStrength, Strength
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from steering.ops import get_operation
from steering.ops.base import Operation, Place, Row, length
from steering.programs.fits import check_width
from steering.programs.gate import check_token_gate, compile_gate, gated_row
from steering.programs.inline import inline_payload, parse_options, split_inline
from steering.programs.layers import explicit_layers, layers_with_numbers
from steering.programs.program import Applied, Compiled, Program

DEFAULT_SITE: Mapping[Op, Site] = {"neuron_mask": "mlp_act", "head_mask": "head_out", "expert_mask": "router"}
# Infinity means "no bound" in these, and "never chosen" at the router.
_UNBOUNDED: Mapping[str, tuple[str, ...]] = {"clamp": ("low", "high"), "route": ("bias",)}
MULTI_SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")


def compile_program(resolved: Sequence[Resolved], facts: ModelFacts, *, most_numbers: int | None = None) -> Program:
    """Compile interventions in order.

    Args:
        most_numbers: that the program may have, at all layers together. A step reads each of them once, and each
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
    intervention, source = item.intervention, item.source
    operation = get_operation(_op(intervention, source))
    inline_tensors: dict[str, Any] = {}
    given_options = dict(intervention.options)
    if intervention.inline is not None:
        inline_tensors, inline_options = split_inline(intervention.inline, operation)
        twice = sorted(set(inline_options) & set(given_options))
        if twice:
            raise InvalidSpec(f"option {twice[0]!r} is given in inline and in options", param=("options", twice[0]))
        given_options |= inline_options
    elif source is not None and source.op == operation.name:
        given_options = _merged(source.options, given_options, OPTIONS[operation.name].alternatives)
    options = parse_options(operation, given_options)
    multi_site = bool(getattr(options, "multi_site", False))
    if multi_site:
        _check_unplaced(intervention)
    sites = MULTI_SITES if multi_site else (_site(intervention, source, operation),)
    if source is not None:
        check_width(source, sites, facts, "artifact")
        _check_model(intervention, source, facts)
        _check_kind(source, operation)
        payload, strength = source.payload, _strength(intervention, source)
    else:
        payload, strength = None, _strength(intervention, None)

    wanted = intervention.layers if intervention.layers is not None else (source.layers if source else None)
    if payload is None:
        if multi_site:
            # Such a direction belongs to no layer in particular; it may be written without one.
            given: list[int] | None = [0]
        else:
            given = None if wanted is None else explicit_layers(wanted, facts)
        payload = inline_payload(inline_tensors, operation, given, facts)
    layers = _all_layers(facts, sites) if multi_site else layers_with_numbers(wanted, payload, facts)
    origin = _source_layer(options, payload, facts) if multi_site else None
    calibrated = None if source is None else _calibrated(source, operation, sites, layers, options, intervention, facts)
    acting = _dosed(strength, calibrated, source, layers, intervention) if strength.unit == "kl" else strength

    gate = compile_gate(intervention.gate, item.probes, facts)
    per_token = check_token_gate(gate, sites) if gate is not None and gate.when == "token" else None
    rows: dict[tuple[Site, int], Row] = {}
    scales: dict[int, float] = {}
    multiples: list[float] = []
    for layer in layers:
        tensors = payload.layers[layer if origin is None else origin]
        scales[layer] = item.factor * _scale(acting, operation, tensors, layer, source, options)
        own = None if source is None else _own_scale(source, calibrated, operation, tensors, layer, options)
        if own:
            multiples.append(abs(scales[layer] / own))
        for site in sites:
            facts.check_site(site, layer, ("options", "multi_site") if multi_site else "layers")
            _check_width(payload, tensors, facts.width(site), site)
            # Strength 0 does nothing, also with ops that know all or nothing only; the rest is checked all the same.
            row = operation.row(tensors, options, Place(facts, site, layer, scales[layer] or 1.0))
            _check_finite(row)
            if per_token is not None:
                row = gated_row(row, per_token, layer)
            if scales[layer] != 0.0:
                rows[site, layer] = row
    applied = Applied(
        artifact=None if source is None else source.ref,
        card=None if source is None else source.card,
        op=operation.name,
        sites=sites,
        layers=tuple(layers),
        strength={"value": strength.value, "unit": strength.unit, "scale": {str(n): s for n, s in scales.items()}},
        options=options.model_dump(),
        card_kl=calibrated.kl_at(scales[layers[0]]) if calibrated and len(set(scales.values())) == 1 else None,
        card_multiple=max(multiples, default=None),
    )
    return Compiled(operation.name, intervention.scope, rows, applied, gate)


def _check_unplaced(intervention: Intervention) -> None:
    if intervention.site is not None:
        raise InvalidSpec(f"multi_site ablation acts at {', '.join(MULTI_SITES)}", param="site",
                          fix="Leave site out, or multi_site.")
    if intervention.layers not in (None, "all"):
        raise InvalidSpec("multi_site ablation acts at every layer", param="layers",
                          fix="Leave layers out; options.source_layer says whose direction is used.")


def _merged(own: Mapping[str, Any], given: Mapping[str, Any], alternatives: Sequence[Sequence[str]]
            ) -> dict[str, Any]:
    """Options of the artifact with those of the request on top. Another mode leaves the artifact's own ones behind, and
    of alternatives the request's choice stands alone."""
    if any(name in given and given[name] != own.get(name) for name in ("mode", "multi_site")):
        return dict(given)
    chosen = [group for group in alternatives if any(name in given for name in group)]
    dropped = {name for group in alternatives if chosen and group not in chosen for name in group}
    return {**{name: value for name, value in own.items() if name not in dropped}, **given}


def _op(intervention: Intervention, source: Source | None) -> Op:
    if intervention.op is not None:
        if source is not None and intervention.op != source.op and "op" not in intervention.override:
            raise ArtifactMismatch(f"{source.ref} is meant for op {source.op}, not {intervention.op}", param="op",
                                   fix='Leave op out, or add "override": ["op"].')
        return intervention.op
    if source is None:
        raise InvalidSpec("inline numbers need an op", param="op")
    return source.op


def _site(intervention: Intervention, source: Source | None, operation: Operation) -> Site:
    site = intervention.site
    if source is not None:
        if site is not None and site != source.site and "site" not in intervention.override:
            raise ArtifactMismatch(f"{source.ref} was made at {source.site}, not {site}", param="site",
                                   fix='Leave site out, or add "override": ["site"].')
        site = site or source.site
    site = site or DEFAULT_SITE.get(operation.name, "resid_post")
    if site not in operation.sites:
        raise UnsupportedSite(f"op {operation.name} does not act at {site}", param="site",
                              fix=f"Sites of {operation.name}: {', '.join(operation.sites)}.")
    return site


def _check_model(intervention: Intervention, source: Source, facts: ModelFacts) -> None:
    if "model" in intervention.override:
        return
    if source.fingerprint is not None and source.fingerprint != facts.fingerprint:
        raise ArtifactMismatch(
            f"{source.ref} was made on {source.model_id or 'another model'} (fingerprint {source.fingerprint[:12]}), "
            f"the loaded model is {facts.model_id} ({facts.fingerprint[:12]})", param="artifact",
            fix='Make it anew on this model, or add "override": ["model"].')


def _check_kind(source: Source, operation: Operation) -> None:
    if source.payload.kind not in operation.kinds:
        raise ArtifactMismatch(f"{source.ref} is a {source.payload.kind}, op {operation.name} takes "
                               f"{', '.join(operation.kinds)}", param="op")


def _strength(intervention: Intervention, source: Source | None) -> Strength:
    own = source.strength if source is not None else Strength(value=1.0)
    if intervention.strength is None:
        return own
    if isinstance(intervention.strength, BareStrength):
        return Strength(value=intervention.strength.value, unit=own.unit)
    return intervention.strength


def _scale(strength: Strength, operation: Operation, tensors: Mapping[str, torch.Tensor], layer: int,
           source: Source | None, options: Any) -> float:
    if strength.unit == "raw":
        return strength.value
    if not operation.adds_direction:
        raise InvalidSpec(f"strength unit {strength.unit} has no meaning for op {operation.name}",
                          param=("strength", "unit"), fix="Use raw: the share of the change that is carried out.")
    if getattr(options, "norm_match", False):
        raise InvalidSpec("with norm_match the strength is a multiple of the token's own norm",
                          param=("strength", "unit"), fix="Use raw.")
    stored = length(operation.direction(tensors))
    if strength.unit == "unit":
        return strength.value / stored
    known = {} if source is None else (source.residual_norm if strength.unit == "rel" else source.sigma)
    if layer not in known:
        what = "mean residual norm" if strength.unit == "rel" else "standard deviation"
        raise InvalidSpec(f"strength unit {strength.unit} needs the {what} of layer {layer}, which "
                          f"{source.ref if source else 'inline numbers'} does not record", param=("strength", "unit"),
                          fix="Use raw or unit, or an artifact made by extraction.")
    return strength.value * known[layer] / stored


def _own_scale(source: Source, calibrated: Calibrated | None, operation: Operation, tensors: Mapping[str, torch.Tensor],
               layer: int, options: Any) -> float | None:
    """The factor that the artifact's own strength comes down to; None where it has no meaning in this setting."""
    own = source.strength
    try:
        if own.unit == "kl":
            return None if calibrated is None else calibrated.strength(own.value)
        return _scale(own, operation, tensors, layer, source, options)
    except TrimtabError:
        return None


def _calibrated(source: Source, operation: Operation, sites: Sequence[Site], layers: Sequence[int], options: Any,
                intervention: Intervention, facts: ModelFacts) -> Calibrated | None:
    """The artifact's curves for exactly this setting on this model."""
    return next((item for item in source.calibrated if item.fingerprint == facts.fingerprint
                 and item.fits(operation.name, sites, layers, options.model_dump(), intervention.scope)), None)


def _dosed(strength: Strength, calibrated: Calibrated | None, source: Source | None, layers: Sequence[int],
           intervention: Intervention) -> Strength:
    """A dose as the raw strength that gives it."""
    if source is None:
        raise InvalidSpec("a dose needs an artifact with a calibration; inline numbers have none", param="strength",
                          fix="Store them as an artifact and run trimtab calibrate, or give the strength in raw.")
    if calibrated is None:
        command = f"trimtab calibrate {source.ref} --prompts FILE"
        if intervention.layers is not None:
            command += f" --layers {','.join(map(str, layers))}"
        if intervention.scope != Scope():
            command += f" --scope '{canonical_scope(intervention.scope)}'"
        if intervention.options:
            command += f" --options '{canonical(intervention.options)}'"
        known = "for other layers, tokens or options only" if source.calibrated else "yet"
        raise NotCalibrated(f"{source.ref} has not been calibrated on this model {known}", param="strength",
                            fix=f"Run: {command}")
    return Strength(value=calibrated.strength(strength.value))


def _all_layers(facts: ModelFacts, sites: Sequence[Site]) -> list[int]:
    for site in sites:
        facts.check_site(site, 0, ("options", "multi_site"))
    return list(range(facts.num_layers))


def _source_layer(options: Any, payload: Payload, facts: ModelFacts) -> int:
    if options.source_layer is not None:
        layer = facts.check_layer(options.source_layer, ("options", "source_layer"))
        if layer not in payload.layers:
            raise InvalidSpec(f"there are no numbers for layer {layer}", param=("options", "source_layer"),
                              fix=f"Layers with numbers: {', '.join(map(str, payload.layers))}.")
        return layer
    if len(payload.layers) > 1:
        raise InvalidSpec("multi_site ablation uses the direction of one layer", param=("options", "source_layer"),
                          fix=f"Name one of {', '.join(map(str, payload.layers))}.")
    return next(iter(payload.layers))


def _check_width(payload: Payload, tensors: Mapping[str, torch.Tensor], width: int, site: Site) -> None:
    for name in ("vector", "weight", "basis", "mean", "up", "down", "scale"):
        if name in tensors and tensors[name].shape[-1] != width:
            raise ArtifactMismatch(f"{payload.kind} has width {tensors[name].shape[-1]}, {site} of the loaded model "
                                   f"has width {width}", param=("inline", name))
    rank = tensors["basis"].shape[0] if "basis" in tensors else tensors["up"].shape[0] if "up" in tensors else 0
    if rank > width:
        raise InvalidSpec(f"rank {rank} is over the width {width}", param="inline")


def _check_finite(row: Row) -> None:
    for name, tensor in row.tensors.items():
        if bool(torch.isnan(tensor).any()) or (name not in _UNBOUNDED.get(row.kernel, ())
                                               and bool(torch.isinf(tensor).any())):
            raise InvalidSpec("the strength is too large: numbers overflow", param="strength")
