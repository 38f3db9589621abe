"""How much a library holds, and the limits on it."""

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from vectors.artifact import Limits
from vectors.library.tables import ArtifactRow, Version
from vectors.storage_errors import LibraryFull

FIX = "Delete what is not used and collect what is left of it (trimtab library gc), or raise {setting}."


@dataclass(frozen=True)
class Usage:
    """Names with at least one version, artifacts and presets together; all their versions; bytes of their numbers
    (equal ones once) and documents. What was deleted counts until `gc` only on the disk, not here."""

    names: int
    versions: int
    nbytes: int


def usage(session: Session) -> Usage:
    names, versions, documents = session.execute(
        select(func.count(Version.named_id.distinct()), func.count(), func.coalesce(func.sum(Version.nbytes), 0))).one()
    blobs = select(func.max(ArtifactRow.nbytes).label("nbytes")).group_by(ArtifactRow.blob).subquery()
    numbers = session.scalar(select(func.coalesce(func.sum(blobs.c.nbytes), 0)))
    return Usage(names, versions, int(documents) + int(numbers or 0))


def check_room(session: Session, limits: Limits, *, names: int = 0, versions: int = 0, nbytes: int = 0) -> None:
    """Raises LibraryFull: so much more would be over a limit. Only growth is refused, so that a library that is over
    a limit can still be changed and shrunk. Writers that meet on PostgreSQL may go over by what they write."""
    if limits.library_bytes is None and limits.library_names is None and limits.library_versions is None:
        return
    held = usage(session)
    for what, setting, have, more, limit in (
            ("names", "library_names", held.names, names, limits.library_names),
            ("versions", "library_versions", held.versions, versions, limits.library_versions),
            ("bytes", "library_bytes", held.nbytes, nbytes, limits.library_bytes)):
        if limit is not None and more > 0 and have + more > limit:
            raise LibraryFull(f"the library holds {have} {what}, and {more} more are over its limit of {limit}",
                              fix=FIX.format(setting=setting))
