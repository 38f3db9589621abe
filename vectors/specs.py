"""Specs as the library stores them: as JSON that reads back equal, with their references to artifacts checked."""

from typing import Any

from sqlalchemy.orm import Session

from steering.errors import TrimtabError
from steering.spec import BareStrength, Spec
from vectors import naming
from vectors.naming import Ref


def dump(spec: Spec) -> dict[str, Any]:
    """Plain data from which `Spec.model_validate` gives the same spec."""
    plain = spec.model_dump(mode="json", exclude_unset=True)
    for intervention, written in zip(spec.interventions, plain["interventions"], strict=True):
        # A bare number leaves the unit to the artifact, and {"value": number} does not.
        if isinstance(intervention.strength, BareStrength):
            written["strength"] = intervention.strength.value
    return plain


def refs_of(spec: Spec) -> list[tuple[int, Ref]]:
    """Artifacts that a spec names, each with the number of its intervention."""
    return [(i, Ref.parse(intervention.artifact, f"interventions[{i}].artifact"))
            for i, intervention in enumerate(spec.interventions) if intervention.artifact is not None]


def check_refs(session: Session, spec: Spec) -> None:
    """Raises NotFound, naming the intervention: an artifact is not there. Locks the names against deletion."""
    for i, ref in sorted(refs_of(spec), key=lambda found: found[1].name):
        try:
            naming.resolve(session, "artifact", ref, lock=True)
        except TrimtabError as error:
            raise error.at(f"spec.interventions[{i}]") from error
