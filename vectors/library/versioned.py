"""What artifacts and presets have in common: immutable versions under a name, and aliases that point at versions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from steering.language.errors import Conflict
from vectors.artifact import Limits
from vectors.library import naming
from vectors.library.audit.notes import note
from vectors.library.database import Database
from vectors.library.listing import relist
from vectors.library.moves import check_still, check_untried
from vectors.library.naming import Ref
from vectors.library.paging import Page, fetch
from vectors.library.requirements import check_passed, check_required
from vectors.library.spaces import READER
from vectors.library.tables import ArtifactRow, Collection, Listing, Named, PresetRow, Version

Item = TypeVar("Item")


class Versioned(ABC, Generic[Item]):
    """One collection of named things.

    A reference (`ref`) is "name" (the alias `production` where set, else the newest version), "name@3", "name@alias"
    or "name@latest". All methods raise LibraryUnavailable where the database is out of reach.
    """

    collection: ClassVar[Collection]
    # The table that holds what a version of this collection says. Its key is the version's id.
    row: ClassVar[type[ArtifactRow] | type[PresetRow]]

    def __init__(self, database: Database, limits: Limits) -> None:
        self._database = database
        self.limits = limits

    @abstractmethod
    def _read(self, session: Session, version_ids: Sequence[int]) -> Sequence[Item]:
        """Items in the order of `version_ids`."""

    def _users(self, session: Session, named: Named) -> Sequence[tuple[Ref, str]]:
        """References to this name that something stored holds, with a name for what holds each."""
        return []

    def versions(self, name: str) -> Sequence[Item]:
        """All versions of a name, newest first. Raises NotFound."""
        naming.check_name(name, self.collection)
        with self._database.read() as session:
            return self._read(session, [found.id for found in naming.versions(session, self.collection, name)])

    def delete(self, ref: str, *, force: bool = False) -> Sequence[str]:
        """Delete the version that "name@3" or "name@alias" means, or with a bare "name" all versions.

        Returns the deleted references. Version numbers are never given out again. Blobs go at the next `gc`.

        Raises:
            NotFound.
            Conflict: a roll-out that is at work needs it, or an alias that requires something points at it; or an
            alias, a preset or the default spec needs it, and `force` is not set. With `force` aliases go too, and
            whatever else named it is refused when it is next used.
        """
        wanted = Ref.parse(ref, self.collection)
        naming.check_changed(wanted.name, self.collection)

        def work(session: Session) -> list[str]:
            every = naming.versions(session, self.collection, wanted.name, lock=True)
            named = every[0].named
            doomed = [naming.resolve(session, self.collection, wanted)] if wanted.selector else every
            check_untried(session, doomed)
            if not force:
                self._check_unused(session, named, doomed, every)
            aliases = naming.aliases_of(session, [version.id for version in doomed])
            check_required(session, named.id, [alias for found in aliases.values() for alias in found])
            note(session, f"{self.collection}.delete", ref, before=[
                {"ref": f"{wanted.name}@{version.number}", "digest": version.digest,
                 "aliases": list(aliases.get(version.id, ()))} for version in doomed])
            naming.drop_aliases(session, [version.id for version in doomed])
            for version in doomed:
                session.delete(session.get_one(self.row, version.id))
                session.flush()
                session.delete(version)
            relist(session, named)
            return [f"{wanted.name}@{version.number}" for version in doomed]

        return self._database.write(work)

    def set_alias(self, name: str, alias: str, version: int) -> Item:
        """Point an alias at a version, in one step if it pointed elsewhere.

        Raises:
            NotFound. Conflict: a roll-out is at work behind it. EvaluationRequired.
        """
        naming.check_name(name, self.collection)
        naming.check_alias(alias)
        naming.check_changed(name, self.collection)

        def work(session: Session) -> Item:
            before = naming.aliased_number(session, self.collection, name, alias)
            moved = naming.set_alias(session, self.collection, name, alias, version)
            check_still(session, moved.named_id, alias)
            check_passed(session, moved, alias)
            note(session, f"{self.collection}.alias", f"{name}@{alias}", before=before, after=version)
            relist(session, moved.named)
            return self._read(session, [moved.id])[0]

        return self._database.write(work)

    def remove_alias(self, name: str, alias: str) -> None:
        """Raises NotFound. Conflict: a roll-out is at work behind it, or it requires something."""
        naming.check_name(name, self.collection)
        naming.check_alias(alias)
        naming.check_changed(name, self.collection)

        def work(session: Session) -> None:
            before = naming.aliased_number(session, self.collection, name, alias)
            named = naming.remove_alias(session, self.collection, name, alias)
            check_still(session, named.id, alias)
            check_required(session, named.id, [alias])
            relist(session, named)
            note(session, f"{self.collection}.alias", f"{name}@{alias}", before=before)

        self._database.write(work)

    def _check_unused(self, session: Session, named: Named, doomed: list[Version], every: list[Version]) -> None:
        """Raises Conflict if an alias or something stored needs one of the versions `doomed`, out of `every`."""
        name = named.name
        aliases = naming.aliases_of(session, [version.id for version in doomed])
        for version in doomed:
            if version.id in aliases:
                raise Conflict(f"the alias {aliases[version.id][0]} points at {name}@{version.number}",
                               param=self.collection, fix="Move or remove the alias first, or force.")
        numbers = {version.number for version in doomed}
        gone = len(doomed) == len(every)
        for ref, user in self._users(session, named):
            if gone or ref.number in numbers:
                raise Conflict(f"{user} uses {name}{'@' if ref.selector else ''}{ref.selector}", param=self.collection,
                               fix="Delete or change that first, or force.")

    def _page(self, conditions: Sequence[ColumnElement[bool]], everything: bool, order: str, limit: int,
              cursor: str | None) -> Page[Item]:
        """One page of the names whose current version meets all `conditions`; see `vectors.library.paging.fetch`.
        everything: also names that belong to other models than the one that is served."""
        model = self._database.model
        own = [] if everything or not model else [naming.fits_model(model)]
        conditions = [*conditions, *READER.get().readable(Listing.name)]
        statement = select(Listing.name, Listing.model, Listing.named_id, Listing.version_id).where(
            Listing.collection == self.collection, *own, *conditions)
        with self._database.read() as session:
            page = fetch(session, statement, order, limit, cursor, filtered=bool(conditions))
            return Page(list(self._read(session, page.items)), page.cursor)
