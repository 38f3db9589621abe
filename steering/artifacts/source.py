"""An artifact as the compiler sees it: its numbers and what its maker recorded about their use."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from steering.artifacts.dose import Calibrated
from steering.artifacts.payload import Payload
from steering.language.gates import Reading
from steering.language.intervention import Intervention
from steering.language.layers import Layers
from steering.language.scope import Scope
from steering.language.strength import Strength
from steering.language.vocabulary import Op, Site


@dataclass(frozen=True)
class Source:
    """One resolved artifact version.

    Attributes:
        ref: name and version as resolved, `cheerful@3`.
        digest: content hash of the numbers.
        model_id, fingerprint: the model it was made on; None where the file did not say (then never refused by model).
        op, site, layers, strength, options: what `{"artifact": NAME}` alone means; op is None for what is only read.
        residual_norm: mean norm of the activation at the site, per layer (unit `rel`).
        sigma: standard deviation of the projection on the direction, per layer (unit `sigma`).
        calibrated: measured curves of KL against strength, by setting (unit `kl`).
        reading: how it is read, of artifacts made for that.
        scope: tokens it acts on where an intervention does not say; None for all.
        warnings: what its card warns of.
        card: digest of the card that `calibrated` was read from. The card is the only part of a version that can
            change.
    """

    ref: str
    digest: str
    payload: Payload
    op: Op | None
    site: Site
    model_id: str | None = None
    fingerprint: str | None = None
    layers: Layers | None = None
    strength: Strength = Strength(value=1.0)
    options: Mapping[str, Any] = field(default_factory=dict)
    residual_norm: Mapping[int, float] = field(default_factory=dict)
    sigma: Mapping[int, float] = field(default_factory=dict)
    calibrated: tuple[Calibrated, ...] = ()
    reading: Reading | None = None
    card: str | None = None
    scope: Scope | None = None
    warnings: tuple[str, ...] = ()

    @property
    def state(self) -> tuple[str, str, str | None]:
        """Two sources with the same state compile to the same program."""
        return self.ref, self.digest, self.card


@dataclass(frozen=True)
class Resolved:
    """An intervention with its artifacts looked up.

    source: None for inline numbers. probes: those of its gates, in order (`gate.gates_of`). factor: what a guard left
    of its strength. captured: of a patch from another run, layer -> the activation `[width]` of the one token that it
    takes; its site is the intervention's, and the artifact or the inline numbers say only in which directions. Of a
    sparsification without an artifact, the lengths `[width]` of the columns that read its site, as far as it needs
    them.
    """

    intervention: Intervention
    source: Source | None = None
    probes: tuple[Source, ...] = ()
    factor: float = 1.0
    captured: Mapping[int, torch.Tensor] | None = None


def scope_of(intervention: Intervention, source: Source | None) -> Scope:
    """The tokens that are asked for; where the intervention does not say, those that the artifact was made for."""
    if "scope" in intervention.model_fields_set or source is None or source.scope is None:
        return intervention.scope
    return source.scope
