"""Specs as the library stores them: as JSON that reads back equal, with their references to artifacts checked."""

import json

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError
from sqlalchemy.orm import Session

from steering.language.errors import InvalidSpec, Path, TrimtabError
from steering.language.gates import Gates
from steering.language.spec import Spec
from steering.language.strength import BareStrength
from steering.programs.gate import gates_of
from vectors.library import naming
from vectors.library.naming import Ref
from vectors.storage_errors import LibraryUnavailable


def to_json(spec: Spec) -> str:
    """JSON from which `from_json` gives the same spec.

    Raises:
        InvalidSpec: inline numbers or options hold what JSON cannot, or are nested too deep.
    """
    try:
        plain = spec.model_dump(exclude_unset=True)
        for intervention, written in zip(spec.interventions, plain["interventions"], strict=True):
            # A bare number leaves the unit to the artifact, and {"value": number} does not.
            if isinstance(intervention.strength, BareStrength):
                written["strength"] = intervention.strength.value
        document = json.dumps(plain, separators=(",", ":"), allow_nan=False)
        Spec.model_validate_json(document)
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as error:
        raise InvalidSpec("the spec cannot be stored as JSON: it holds NaN, infinity or broken Unicode, or is nested "
                          "too deep", param="spec") from error
    return document


def from_json(document: str, what: str) -> Spec:
    """Raises LibraryUnavailable: `what` was stored by a version with another language."""
    try:
        return Spec.model_validate_json(document)
    except ValidationError as error:
        raise LibraryUnavailable(f"{what} cannot be read: {error}", fix="Store it anew.") from error


def refs_of(spec: Spec) -> list[tuple[Path, Ref]]:
    """Artifacts that a spec names, each with the field that names it."""
    found = []
    for i, intervention in enumerate(spec.interventions):
        where: Path = ("interventions", i)
        if intervention.artifact is not None:
            field: Path = (*where, "artifact")
            found.append((field, Ref.parse(intervention.artifact, field)))
        for n, gate in enumerate(gates_of(intervention.gate)):
            member = (intervention.gate.members[0], n) if isinstance(intervention.gate, Gates) else ()
            field = (*where, "gate", *member, "probe")
            found.append((field, Ref.parse(gate.probe, field)))
    for i, limit in enumerate(spec.guard.monitor if spec.guard is not None else ()):
        field = ("guard", "monitor", i, "artifact")
        found.append((field, Ref.parse(limit.artifact, field)))
    return found


def named_in(spec: Spec) -> list[tuple[Path, str]]:
    """The names of `refs_of`."""
    return [(field, ref.name) for field, ref in refs_of(spec)]


def check_refs(session: Session, spec: Spec) -> None:
    """Raises NotFound, naming the place: an artifact is not there. Locks the names against deletion."""
    for field, ref in sorted(refs_of(spec), key=lambda found: found[1].name):
        try:
            naming.resolve(session, "artifact", ref, lock=True)
        except TrimtabError as error:
            raise error.about("spec", *field) from error
