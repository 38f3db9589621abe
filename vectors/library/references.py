"""What stands in the way of deleting artifact versions: aliases, presets and the default spec that need them."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from steering.language.errors import Conflict
from vectors.library.naming import Ref, aliases_of
from vectors.library.switches import default_refs
from vectors.library.tables import Named, PresetUse, Version


def check_unused(session: Session, name: str, doomed: list[Version], every: list[Version]) -> None:
    """Refuse to delete `doomed` of the versions `every` of an artifact while something needs them.

    Raises:
        Conflict: naming what needs it.
    """
    aliases = aliases_of(session, [version.id for version in doomed])
    for version in doomed:
        if version.id in aliases:
            raise Conflict(f"the alias {aliases[version.id][0]} points at {name}@{version.number}", param="artifact",
                           fix="Move or remove the alias first, or force.")
    numbers = {version.number for version in doomed}
    gone = len(doomed) == len(every)
    for ref, user in _uses(session, name):
        if gone or ref.number in numbers:
            raise Conflict(f"{user} uses {name}{'@' if ref.selector else ''}{ref.selector}", param="artifact",
                           fix="Delete or change that first, or force.")


def _uses(session: Session, name: str) -> list[tuple[Ref, str]]:
    statement = (select(PresetUse.selector, Named.name, Version.number)
                 .join(Version, Version.id == PresetUse.version_id).join(Named, Named.id == Version.named_id)
                 .where(PresetUse.name == name))
    presets = [(Ref(name, selector), f"the preset {preset}@{number}")
               for selector, preset, number in session.execute(statement)]
    return presets + [(ref, "the default spec") for ref in default_refs(session) if ref.name == name]
