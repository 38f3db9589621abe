"""The library: what the server, the CLI and extraction call. Synchronous, and safe to call from many threads."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

from safetensors.torch import load, save
from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from steering.artifacts.payload import Kind, Payload
from steering.artifacts.source import Source
from steering.language.vocabulary import Op, Site
from vectors.artifact import Artifact, Limits, Metadata, Patch
from vectors.calibration import Setting as CalibratedSetting
from vectors.calibration import with_settings
from vectors.checks import check, check_storable
from vectors.library import naming
from vectors.library.access import AccessKeys
from vectors.library.artifacts import read_artifacts, tag_rows
from vectors.library.audit.log import AuditLog
from vectors.library.audit.notes import note
from vectors.library.blobs import BlobStore, Stored, digest_of
from vectors.library.connections import CONNECTIONS
from vectors.library.database import LOCK_WAIT_S, Database
from vectors.library.evaluations import Evaluations
from vectors.library.listing import has_tag, holds, relist
from vectors.library.naming import Ref
from vectors.library.paging import Page
from vectors.library.policies import Policies
from vectors.library.presets import Presets
from vectors.library.quota import Usage, check_room, usage
from vectors.library.references import users_of
from vectors.library.requirements import Requirements
from vectors.library.rollouts import Rollouts
from vectors.library.sources import Sources
from vectors.library.switches import Switches
from vectors.library.tables import NO_OP, ArtifactRow, Collection, Listing, Named, Setting, Version
from vectors.library.versioned import Versioned
from vectors.storage_errors import CorruptBlob


@dataclass(frozen=True)
class Filter:
    """Which artifacts to list: those for which all that is given holds. `q` is searched in name, description, tags.
    everything: also those of other models than the one that is served."""

    q: str | None = None
    kind: Kind | None = None
    op: Op | None = None
    site: Site | None = None
    tag: str | None = None
    model_id: str | None = None
    everything: bool = False


@dataclass(frozen=True)
class Collected:
    """What `gc` removed: digests of unreferenced blobs, the number of files that killed writers left, and the bytes of
    both."""

    blobs: list[str] = field(default_factory=list)
    partial: int = 0
    nbytes: int = 0


class Library(Versioned[Artifact]):
    """Versioned artifacts. `presets`, `switches`, `keys`, `evaluations`, `policies`, `rollouts` and `audit` hold
    the rest of what a library stores."""

    collection = "artifact"
    row = ArtifactRow

    def __init__(self, database: Database, blobs: BlobStore, limits: Limits, cache_bytes: int) -> None:
        super().__init__(database, limits)
        self._blobs = blobs
        self.presets = Presets(database, limits)
        self.switches = Switches(database)
        self.keys = AccessKeys(database)
        self.audit = AuditLog(database)
        self.policies = Policies(database)
        self.rollouts = Rollouts(database)
        self.requirements = Requirements(database)
        self.evaluations = Evaluations(database)
        self.sources = Sources(database, self.payload, cache_bytes)

    @classmethod
    def open(cls, url: str, blob_url: str, limits: Limits = Limits(), cache_bytes: int = 2**30,  # noqa: B008
             wait_s: float = LOCK_WAIT_S, connections: int = CONNECTIONS) -> Self:
        """Open a library, creating or migrating what is needed.

        Args:
            url: a SQLAlchemy URL, `sqlite:////var/lib/trimtab/library.db` say.
            blob_url: a path or a URL that fsspec knows.
            cache_bytes: memory for artifacts lately used.
            wait_s: how long to wait for another writer.
            connections: how many to the database may be open at once, where it is not SQLite.
        """
        return cls(Database(url, wait_s, connections), BlobStore(blob_url), limits, cache_bytes)

    def close(self) -> None:
        self._database.close()

    def follow(self, changed: Callable[[], None], late: Callable[[], None]) -> None:
        """Learn of the changes of other processes as they are made, where the database tells of them.

        Args:
            changed: called after each, from another thread.
            late: called where one is found that may have been made more than a second ago.
        """
        self._database.revision.late = late
        self._database.follow(changed)

    @property
    def followed(self) -> bool | None:
        """Whether changes of others are told at present; None where the database does not tell of them."""
        return self._database.followed

    def serve(self, fingerprint: str) -> None:
        """Names are those of this model from now on, where it has them. Call it before the library is used."""
        self._database.model = fingerprint

    def holds(self, collection: Collection, name: str) -> bool:
        """Whether the model that is served, or none in particular, has something of this name."""
        with self._database.read() as session:
            named = naming.find_own(session, collection, name, self._database.model)
            return named is not None and naming.has_versions(session, named)

    def create(self, metadata: Metadata, payload: Payload) -> Artifact:
        """Store a new version under `metadata.name` and return it once it is durable.

        The same metadata and numbers again give the version that holds them already.

        Raises:
            InvalidMetadata, PayloadTooLarge: see `vectors.checks.check`. LibraryFull: there is no room for it.
        """
        metadata = check(metadata, payload, self.limits)
        naming.check_written(metadata.name, "name")
        data = save(payload.to_tensors())
        document = metadata.document()
        content = hashlib.sha256(f"{digest_of(data)}\n{document}".encode()).hexdigest()

        with self._database.read() as session:
            # Before the numbers are written; what counts is the check within the transaction.
            named = naming.find_own(session, "artifact", metadata.name, self._model_of(metadata))
            self._check_room(session, named, metadata.name, data, document, content)
        self._blobs.put(data)
        return self._database.write(partial(self._insert, metadata, document, payload, data, content))

    def resolve(self, ref: str) -> Artifact:
        """The version that `ref` means, without its numbers.

        Raises:
            InvalidRequest: not the form of a reference. NotFound: no such name, version or alias.
        """
        with self._database.read() as session:
            version = naming.resolve(session, "artifact", Ref.parse(ref, "artifact"))
            return read_artifacts(session, [version.id])[0]

    def source(self, ref: str) -> Source:
        """The version that `ref` means, in the form the compiler takes; see `Sources.get`."""
        return self.sources.get(ref)

    def payload(self, artifact: Artifact) -> Payload:
        """The numbers of a version, read from storage and verified.

        Raises:
            CorruptBlob: missing or damaged.
        """
        return Payload.from_tensors(artifact.metadata.kind, load(self._blobs.get(artifact.digest)))

    def list(self, filter: Filter = Filter(), *, order: str = "name", limit: int = 50,  # noqa: B008
             cursor: str | None = None) -> Page[Artifact]:
        """One artifact per name: the version that the bare name means. Filters look at that version.

        Args:
            order: "name", "created" (first use of the name), or either with "-" before it for descending.
            cursor: of the page before. Paging through sees every name that is there all along exactly once.
        """
        conditions = [getattr(Listing, column) == naming.searchable(wanted, column)
                      for column in ("kind", "op", "site", "model_id")
                      if (wanted := getattr(filter, column)) is not None]
        if filter.tag is not None:
            conditions.append(has_tag(naming.searchable(filter.tag, "tag")))
        if filter.q is not None:
            conditions.append(holds(naming.searchable(filter.q, "q")))
        return self._page(conditions, filter.everything, order, limit, cursor)

    def patch(self, ref: str, patch: Patch) -> Artifact:
        """Change the description, tags or card of one version. Numbers and the rest of the metadata never change."""
        wanted = Ref.parse(ref, "artifact")
        naming.check_changed(wanted.name, "artifact")

        def work(session: Session) -> Artifact:
            version = naming.resolve(session, "artifact", wanted, lock=True)
            row = session.get_one(ArtifactRow, version.id)
            before = _patchable(row)
            if patch.description is not None:
                row.description = patch.description
            if patch.tags is not None:
                row.tags = []
                session.flush()
                row.tags = tag_rows(patch.tags)
            if "card" in patch.model_fields_set:
                row.card = patch.card
            changed = self._changed(session, version)
            note(session, "artifact.patch", changed.ref, before=before, after=_patchable(row))
            return changed

        return self._database.write(work)

    def add_calibration(self, ref: str, settings: Sequence[CalibratedSetting]) -> Artifact:
        """Keep what a calibration measured in the card of one version, in place of equal settings. Raises NotFound."""
        wanted = Ref.parse(ref, "artifact")
        naming.check_changed(wanted.name, "artifact")

        def work(session: Session) -> Artifact:
            version = naming.resolve(session, "artifact", wanted, lock=True)
            row = session.get_one(ArtifactRow, version.id)
            before = row.card
            row.card = with_settings(before, settings)
            changed = self._changed(session, version)
            note(session, "artifact.calibrate", changed.ref, before=before, after=row.card)
            return changed

        return self._database.write(work)

    def gc(self, min_age_s: float = 3600.0) -> Collected:
        """Remove blobs that no version names and files that killed writers left, if older than `min_age_s`.

        Safe beside running uploads at any age: a writer that finds its blob gone stores it again. Files still being
        written are protected by their age alone. Files of other names are not the library's and stay.
        """
        with self._database.read() as session:
            used = set(session.scalars(select(ArtifactRow.blob)))
        collected, left, nbytes = [], 0, 0
        for stored in self._blobs.files():
            if stored.age_s < min_age_s or stored.digest in used:
                continue
            if stored.digest is None:
                self._blobs.remove(stored)
                left += 1
            elif self._database.write(partial(self._remove_unused, stored)):
                collected.append(stored.digest)
            else:
                continue
            nbytes += stored.nbytes
        return Collected(collected, left, nbytes)

    def damaged(self) -> Sequence[str]:
        """References of all versions whose numbers are missing or damaged. Reads everything."""
        with self._database.read() as session:
            artifacts = read_artifacts(session, list(session.scalars(select(ArtifactRow.version_id))))
        found = []
        for artifact in artifacts:
            try:
                self.payload(artifact)
            except CorruptBlob:
                found.append(artifact.ref)
        return found

    def usage(self) -> Usage:
        """How much the library holds."""
        with self._database.read() as session:
            return usage(session)

    def _read(self, session: Session, version_ids: Sequence[int]) -> Sequence[Artifact]:
        return read_artifacts(session, version_ids)

    def _users(self, session: Session, named: Named) -> Sequence[tuple[Ref, str]]:
        return users_of(session, named)

    def _model_of(self, metadata: Metadata) -> str:
        """The model that an artifact belongs to: the one it was made on, else the one that is served."""
        return metadata.fingerprint or self._database.model

    def _changed(self, session: Session, version: Version) -> Artifact:
        """The version after a change of what describes it. Raises PayloadTooLarge, LibraryFull."""
        relist(session, version.named)
        session.flush()
        artifact = read_artifacts(session, [version.id])[0]
        check_storable(artifact.metadata, self.limits)
        nbytes = len(artifact.metadata.document())
        check_room(session, self.limits, artifact.metadata.name, nbytes=nbytes - version.nbytes)
        version.nbytes = nbytes
        return artifact

    def _remove_unused(self, stored: Stored, session: Session) -> bool:
        _lock_blobs(session, shared=False)
        if session.scalar(select(exists().where(ArtifactRow.blob == stored.digest))):
            return False
        self._blobs.remove(stored)
        note(session, "blob.remove", stored.digest or "", before={"bytes": stored.nbytes})
        return True

    def _check_room(self, session: Session, named: Named | None, name: str, data: bytes, document: str, content: str
                    ) -> None:
        """Raises LibraryFull, unless the version is there already."""
        if named is not None and naming.same_content(session, named, content) is not None:
            return
        check_room(session, self.limits, name, names=named is None or not naming.has_versions(session, named),
                   versions=1, nbytes=len(document), numbers=(digest_of(data), len(data)))

    def _insert(self, metadata: Metadata, document: str, payload: Payload, data: bytes, content: str,
                session: Session) -> Artifact:
        """The new version, or the old one of the same content."""
        _lock_blobs(session, shared=True)
        named = naming.take_name(session, "artifact", metadata.name, self._model_of(metadata))
        version = naming.same_content(session, named, content)
        if version is None:
            self._check_room(session, named, metadata.name, data, document, content)
            blob = digest_of(data)
            if not self._blobs.exists(blob):
                # `gc` took it in between; from here on the lock keeps it out.
                self._blobs.put(data)
            version = naming.add_version(session, named, content, len(document))
            session.add(ArtifactRow(
                version=version, blob=blob, nbytes=len(data), layers=list(payload.layers), kind=metadata.kind,
                op=metadata.op or NO_OP, site=metadata.site, model_id=metadata.model_id,
                description=metadata.description, card=metadata.card, document=document, tags=tag_rows(metadata.tags)))
            relist(session, named)
            note(session, "artifact.create", f"{metadata.name}@{version.number}", after={
                "digest": content, "numbers": blob, "kind": metadata.kind, "op": metadata.op, "site": metadata.site,
                "layers": list(payload.layers), "bytes": len(data)})
        return read_artifacts(session, [version.id])[0]


def _patchable(row: ArtifactRow) -> dict[str, object]:
    return {"description": row.description, "tags": [tag.tag for tag in row.tags], "card": row.card}


def _lock_blobs(session: Session, *, shared: bool) -> None:
    session.execute(select(Setting).where(Setting.key == "blobs").with_for_update(read=shared))
