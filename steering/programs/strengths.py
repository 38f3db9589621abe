"""The third step of compiling an intervention: from its strength, in whatever unit, to a factor for each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steering.artifacts.dose import Calibrated, canonical, canonical_scope
from steering.artifacts.source import Resolved, Source, scope_of
from steering.language.errors import InvalidSpec, NotCalibrated, TrimtabError
from steering.language.intervention import Intervention
from steering.language.scope import Scope
from steering.language.strength import BareStrength, Strength
from steering.models.facts import ModelFacts
from steering.ops.base import Operation, length
from steering.programs.choices import Chosen
from steering.programs.numbers import Numbers


@dataclass(frozen=True)
class Scales:
    """A strength as it was asked for, and the factor on the stored numbers that it comes down to at each layer.

    expected_kl: KL in nats per token that the artifact's calibration measured for this setting and strength, if it did.
    multiple: how many times the artifact's own strength this is, at the layer where it is most; None where there is no
    own strength to compare with.
    """

    stated: Strength
    by_layer: Mapping[int, float]
    expected_kl: float | None
    multiple: float | None


def scales_of(item: Resolved, chosen: Chosen, numbers: Numbers, facts: ModelFacts) -> Scales:
    """
    Raises:
        InvalidSpec: a unit that has no meaning here, or a dose beyond what was measured.
        NotCalibrated: a dose for a setting that was not calibrated.
    """
    operation, options = chosen.operation, chosen.options
    # The strength of a patch from another run is the share of it, and none of the artifact that says the directions.
    source = item.source if item.captured is None else None
    stated = _stated(item.intervention, source)
    calibrated = None if source is None else _calibrated(source, chosen, numbers.layers, item.intervention, facts)
    acting = _dosed(stated, calibrated, source, numbers.layers, item.intervention) if stated.unit == "kl" else stated
    scales: dict[int, float] = {}
    multiples: list[float] = []
    for layer, tensors in numbers.by_layer.items():
        scales[layer] = item.factor * _scale(acting, operation, tensors, layer, source, options)
        own = None if source is None else _own_scale(source, calibrated, operation, tensors, layer, options)
        if own:
            multiples.append(abs(scales[layer] / own))
    uniform = calibrated is not None and len(set(scales.values())) == 1
    return Scales(stated, scales, calibrated.kl_at(next(iter(scales.values()))) if calibrated and uniform else None,
                  max(multiples, default=None))


def _stated(intervention: Intervention, source: Source | None) -> Strength:
    own = source.strength if source is not None else Strength(value=1.0)
    if intervention.strength is None:
        return own
    if isinstance(intervention.strength, BareStrength):
        return Strength(value=intervention.strength.value, unit=own.unit)
    return intervention.strength


def _calibrated(source: Source, chosen: Chosen, layers: Sequence[int], intervention: Intervention, facts: ModelFacts
                ) -> Calibrated | None:
    """The artifact's curves for exactly this setting on this model."""
    options, scope = chosen.options.model_dump(), scope_of(intervention, source)
    return next((item for item in source.calibrated if item.fingerprint == facts.fingerprint
                 and item.fits(chosen.operation.name, chosen.sites, layers, options, scope)), None)


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
        if scope_of(intervention, source) != Scope():
            command += f" --scope '{canonical_scope(scope_of(intervention, source))}'"
        if intervention.options:
            command += f" --options '{canonical(intervention.options)}'"
        known = "for other layers, tokens or options only" if source.calibrated else "yet"
        raise NotCalibrated(f"{source.ref} has not been calibrated on this model {known}", param="strength",
                            fix=f"Run: {command}")
    return Strength(value=calibrated.strength(strength.value))


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
