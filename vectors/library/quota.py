"""How much a library holds, and the limits on it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from vectors.artifact import Limits
from vectors.library.spaces import owned, owner_of
from vectors.library.tables import ArtifactRow, Named, PolicyRow, Version
from vectors.storage_errors import LibraryFull

# The field of a policy that says how much a tenant may use.
QUOTA = "quota"
FIX = "Delete what is not used and collect what is left of it (trimtab library gc), or raise {setting}."


@dataclass(frozen=True)
class Usage:
    """Names with at least one version, artifacts and presets together; all their versions; bytes of their numbers
    (equal ones once) and documents. What was deleted counts until `gc` only on the disk, not here."""

    names: int
    versions: int
    nbytes: int


def usage(session: Session, of: Sequence[ColumnElement[bool]] = ()) -> Usage:
    """of: conditions on the names that count; by default all do."""
    names, versions, documents = session.execute(
        select(func.count(Version.named_id.distinct()), func.count(), func.coalesce(func.sum(Version.nbytes), 0))
        .join(Named, Named.id == Version.named_id).where(*of)).one()
    blobs = select(func.max(ArtifactRow.nbytes).label("nbytes")).join(
        Version, Version.id == ArtifactRow.version_id).join(Named, Named.id == Version.named_id).where(*of).group_by(
        ArtifactRow.blob).subquery()
    numbers = session.scalar(select(func.coalesce(func.sum(blobs.c.nbytes), 0)))
    return Usage(names, versions, int(documents) + int(numbers or 0))


def check_room(session: Session, limits: Limits, name: str, *, names: int = 0, versions: int = 0, nbytes: int = 0,
               numbers: tuple[str, int] | None = None) -> None:
    """Whether so much more fits under `name`, of the library and of the tenant that the name belongs to. Only growth is
    refused, so that a library that is over a limit can still be changed and shrunk. Writers that meet on PostgreSQL may
    go over by what they write.

    Args:
        nbytes: of documents. numbers: digest and bytes of a blob, which counts where it is not there yet.

    Raises:
        LibraryFull.
    """
    if (limits.library_bytes, limits.library_names, limits.library_versions) != (None, None, None):
        held, more = usage(session), nbytes + _new(session, numbers, [])
        for what, setting, have, much, limit in (
                ("names", "library_names", held.names, names, limits.library_names),
                ("versions", "library_versions", held.versions, versions, limits.library_versions),
                ("bytes", "library_bytes", held.nbytes, more, limits.library_bytes)):
            if limit is not None and much > 0 and have + much > limit:
                raise LibraryFull(f"the library holds {have} {what}, and {much} more are over its limit of {limit}",
                                  fix=FIX.format(setting=setting))
    tenant = owner_of(name)
    most = _quota(session, tenant)
    if any(most.values()):
        mine = [owned(Named.name, tenant)]
        held, more = usage(session, mine), nbytes + _new(session, numbers, mine)
        for what, have, much in (("names", held.names, names), ("bytes", held.nbytes, more)):
            limit = most[what]
            if limit is not None and much > 0 and have + much > limit:
                raise LibraryFull(f"the tenant {tenant} holds {have} {what}, and {much} more are over its quota of "
                                  f"{limit}", fix="Delete what is not used, or have an administrator raise the quota.")


def _quota(session: Session, tenant: str) -> dict[str, int | None]:
    """What the policy of a tenant says about the library."""
    row = session.get(PolicyRow, (tenant, ""))
    found = {} if row is None else json.loads(row.document).get(QUOTA) or {}
    return {what: found.get(f"library_{what}") for what in ("names", "bytes")}


def _new(session: Session, numbers: tuple[str, int] | None, of: Sequence[ColumnElement[bool]]) -> int:
    """Bytes of a blob that none of the names has yet."""
    if numbers is None:
        return 0
    digest, nbytes = numbers
    statement = select(ArtifactRow.blob).join(Version, Version.id == ArtifactRow.version_id).join(
        Named, Named.id == Version.named_id).where(ArtifactRow.blob == digest, *of)
    return 0 if session.scalar(statement.limit(1)) else nbytes
