"""Who names an artifact: presets and the default spec."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from vectors.library.naming import Ref
from vectors.library.switches import default_refs
from vectors.library.tables import Named, PresetUse, Version


def users_of(session: Session, name: str) -> list[tuple[Ref, str]]:
    """Every reference to the artifact that something stored holds, with a name for what holds it."""
    statement = (select(PresetUse.selector, Named.name, Version.number)
                 .join(Version, Version.id == PresetUse.version_id).join(Named, Named.id == Version.named_id)
                 .where(PresetUse.name == name))
    presets = [(Ref(name, selector), f"the preset {preset}@{number}")
               for selector, preset, number in session.execute(statement)]
    return presets + [(ref, "the default spec") for ref in default_refs(session) if ref.name == name]
