"""Who names an artifact: presets, the default spec and mandatory specs of policies."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from vectors.library.naming import Ref
from vectors.library.policies import mandatory_refs
from vectors.library.spaces import READER
from vectors.library.switches import default_refs
from vectors.library.tables import Named, PresetUse, Version


def users_of(session: Session, named: Named) -> list[tuple[Ref, str]]:
    """Every reference to an artifact that something stored holds which may mean it, with a name for what holds it. A
    preset of one model means the artifacts of that model."""
    name = named.name
    statement = (select(PresetUse.selector, Named.name, Version.number)
                 .join(Version, Version.id == PresetUse.version_id).join(Named, Named.id == Version.named_id)
                 .where(PresetUse.name == name))
    if named.model:
        statement = statement.where(Named.model.in_({named.model, ""}))
    reads = READER.get().reads
    presets = [(Ref(name, selector), f"the preset {preset}@{number}" if reads(preset) else "a preset of another tenant")
               for selector, preset, number in session.execute(statement)]
    return presets + [(ref, user) for ref, user in [*((ref, "the default spec") for ref in default_refs(session)),
                                                    *mandatory_refs(session)] if ref.name == name]
