"""The library: what the server, the CLI and extraction call. Synchronous, and safe to call from many threads."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, Self

from cachetools import LRUCache
from pydantic import ValidationError
from safetensors.torch import load, save
from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from steering.artifacts.payload import Kind, Payload
from steering.artifacts.source import Source
from steering.language.errors import NotFound
from steering.language.vocabulary import Op, Site
from vectors.artifact import Artifact, Limits, Metadata, Patch, check, check_storable
from vectors.calibration import Setting as CalibratedSetting
from vectors.calibration import with_settings
from vectors.library import naming, references
from vectors.library.blobs import BlobStore, Stored, digest_of
from vectors.library.database import LOCK_WAIT_S, Database
from vectors.library.evaluations import Evaluations
from vectors.library.listing import has_tag, holds, relist
from vectors.library.naming import Ref
from vectors.library.paging import Page, fetch
from vectors.library.presets import Presets
from vectors.library.quota import Usage, check_room, usage
from vectors.library.revision import Memory
from vectors.library.switches import Switches
from vectors.library.tables import ArtifactRow, Listing, Named, Setting, Tag, Version
from vectors.storage_errors import CorruptBlob, LibraryUnavailable

SOURCE_BYTES = 4096
# A card that was read takes a few times what it takes as text.
CARD_FACTOR = 8
MOST_MADE_FOR = 16_384
MOST_MEANT = 2**17


@dataclass(frozen=True)
class Filter:
    """Which artifacts to list: those for which everything given holds. `q` is searched in name, description, tags."""

    q: str | None = None
    kind: Kind | None = None
    op: Op | None = None
    site: Site | None = None
    tag: str | None = None
    model_id: str | None = None


@dataclass(frozen=True)
class MadeFor:
    """The model that an artifact was made on, as far as it records that. d_model: of artifacts at residual sites."""

    fingerprint: str | None
    d_model: int | None


@dataclass(frozen=True)
class Collected:
    """What `gc` removed: digests of unreferenced blobs, the number of files that killed writers left, and the bytes of
    both."""

    blobs: list[str] = field(default_factory=list)
    partial: int = 0
    nbytes: int = 0


class Library:
    """Versioned artifacts. `presets` and `switches` hold the rest of what a library stores.

    A reference (`ref`) is "name" (the alias `production` where set, else the newest version), "name@3", "name@alias"
    or "name@latest". All methods raise LibraryUnavailable where the database is out of reach.
    """

    def __init__(self, database: Database, blobs: BlobStore, limits: Limits, cache_bytes: int) -> None:
        self._database = database
        self._blobs = blobs
        self.limits = limits
        self.presets = Presets(database, limits)
        self.switches = Switches(database)
        self.evaluations = Evaluations(database)
        # What references mean: version and state of the card. Of what a source holds, only the card can change.
        self._meant: Memory[tuple[str, str]] = Memory(database, MOST_MEANT)
        # With the state of the card it was made from and the bytes it takes.
        self._cache: LRUCache[str, tuple[Source, str, int]] = LRUCache(cache_bytes, getsizeof=lambda kept: kept[2])
        # By version, of which none ever changes and no number is given out again.
        self._made_for: LRUCache[int, MadeFor] = LRUCache(MOST_MADE_FOR)
        self._cache_lock = Lock()

    @classmethod
    def open(cls, url: str, blob_url: str, limits: Limits = Limits(), cache_bytes: int = 2**30,  # noqa: B008
             wait_s: float = LOCK_WAIT_S) -> Self:
        """Open a library, creating or migrating what is needed.

        Args:
            url: a SQLAlchemy URL, `sqlite:////var/lib/trimtab/library.db` say.
            blob_url: a path or a URL that fsspec knows.
            cache_bytes: memory for artifacts lately used.
            wait_s: how long to wait for another writer.
        """
        return cls(Database(url, wait_s), BlobStore(blob_url), limits, cache_bytes)

    def close(self) -> None:
        self._database.close()

    def create(self, metadata: Metadata, payload: Payload) -> Artifact:
        """Store a new version under `metadata.name` and return it once it is durable.

        The same metadata and numbers again give the version that holds them already.

        Raises:
            InvalidMetadata, PayloadTooLarge: see `vectors.artifact.check`. LibraryFull: there is no room for it.
        """
        metadata = check(metadata, payload, self.limits)
        data = save(payload.to_tensors())
        document = metadata.document()
        content = hashlib.sha256(f"{digest_of(data)}\n{document}".encode()).hexdigest()

        with self._database.read() as session:
            # Before the numbers are written; what counts is the check within the transaction.
            self._check_room(session, naming.find_name(session, "artifact", metadata.name), data, document, content)
        self._blobs.put(data)
        return self._database.write(partial(self._insert, metadata, document, payload, data, content))

    def resolve(self, ref: str) -> Artifact:
        """The version that `ref` means, without its numbers.

        Raises:
            InvalidRequest: not the form of a reference. NotFound: no such name, version or alias.
        """
        with self._database.read() as session:
            version = naming.resolve(session, "artifact", Ref.parse(ref, "artifact"))
            return _artifacts(session, [version.id])[0]

    def source(self, ref: str) -> Source:
        """The version that `ref` means, in the form the compiler takes, from memory where the library has not changed
        and the numbers are still there."""
        parsed = Ref.parse(ref, "artifact")
        key, state = self._meant.get(ref, lambda session: _meant(session, parsed))
        with self._cache_lock:
            cached = self._cache.get(key)
        if cached is not None and cached[1] == state:
            return cached[0]
        with self._database.read() as session:
            artifact = _artifacts(session, [naming.resolve(session, "artifact", parsed).id])[0]
        key, card = artifact.ref, artifact.metadata.card
        with self._cache_lock:
            cached = self._cache.get(key)
        payload = self.payload(artifact) if cached is None else cached[0].payload
        try:
            source = artifact.to_source(payload)
        except ValidationError as error:
            raise LibraryUnavailable(f"the calibration of {key} cannot be read: {error}",
                                     fix="Calibrate it anew.") from error
        with self._cache_lock:
            if cached_bytes(source, card) <= self._cache.maxsize:
                self._cache[key] = source, _state(card), cached_bytes(source, card)
        return source

    def made_for(self, refs: Iterable[str]) -> dict[str, MadeFor]:
        """By reference, without reading numbers. What is not there is left out."""
        found: dict[str, MadeFor] = {}
        with self._database.read() as session:
            for ref in set(refs):
                try:
                    version = naming.resolve(session, "artifact", Ref.parse(ref, "artifact"))
                except NotFound:
                    continue
                with self._cache_lock:
                    known = self._made_for.get(version.id)
                if known is None:
                    metadata = _artifacts(session, [version.id])[0].metadata
                    known = MadeFor(metadata.fingerprint, metadata.d_model)
                    with self._cache_lock:
                        self._made_for[version.id] = known
                found[ref] = known
        return found

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
        statement = select(Listing.name, Listing.named_id, Listing.version_id).where(Listing.collection == "artifact")
        for column in ("kind", "op", "site", "model_id"):
            wanted = getattr(filter, column)
            if wanted is not None:
                statement = statement.where(getattr(Listing, column) == naming.searchable(wanted, column))
        if filter.tag is not None:
            statement = statement.where(has_tag(naming.searchable(filter.tag, "tag")))
        if filter.q is not None:
            statement = statement.where(holds(naming.searchable(filter.q, "q")))
        with self._database.read() as session:
            page = fetch(session, statement, order, limit, cursor, filtered=filter != Filter())
            return Page(_artifacts(session, page.items), page.cursor)

    def versions(self, name: str) -> Sequence[Artifact]:
        """All versions of a name, newest first. Raises NotFound."""
        naming.check_name(name, "artifact")
        with self._database.read() as session:
            return _artifacts(session, [version.id for version in naming.versions(session, "artifact", name)])

    def patch(self, ref: str, patch: Patch) -> Artifact:
        """Change the description, tags or card of one version. Numbers and the rest of the metadata never change."""
        wanted = Ref.parse(ref, "artifact")

        def work(session: Session) -> Artifact:
            version = naming.resolve(session, "artifact", wanted, lock=True)
            row = session.get_one(ArtifactRow, version.id)
            if patch.description is not None:
                row.description = patch.description
            if patch.tags is not None:
                row.tags = []
                session.flush()
                row.tags = _tags(patch.tags)
            if "card" in patch.model_fields_set:
                row.card = patch.card
            return self._changed(session, version)

        return self._database.write(work)

    def add_calibration(self, ref: str, settings: Sequence[CalibratedSetting]) -> Artifact:
        """Keep what a calibration measured in the card of one version, in place of equal settings. Raises NotFound."""
        wanted = Ref.parse(ref, "artifact")

        def work(session: Session) -> Artifact:
            version = naming.resolve(session, "artifact", wanted, lock=True)
            row = session.get_one(ArtifactRow, version.id)
            row.card = with_settings(row.card, settings)
            return self._changed(session, version)

        return self._database.write(work)

    def delete(self, ref: str, *, force: bool = False) -> Sequence[str]:
        """Delete the version that "name@3" or "name@alias" means, or with a bare "name" all versions.

        Returns the deleted references. Version numbers are never given out again. Blobs go at the next `gc`.

        Raises:
            NotFound. Conflict: an alias, a preset or the default spec needs it, and `force` is not set; with `force`
            aliases go too, and whatever else named it is refused when it is next used.
        """
        wanted = Ref.parse(ref, "artifact")

        def work(session: Session) -> list[str]:
            every = naming.versions(session, "artifact", wanted.name, lock=True)
            doomed = [naming.resolve(session, "artifact", wanted)] if wanted.selector else every
            if not force:
                references.check_unused(session, wanted.name, doomed, every)
            naming.drop_aliases(session, [version.id for version in doomed])
            for version in doomed:
                session.delete(session.get_one(ArtifactRow, version.id))
                session.flush()
                session.delete(version)
            relist(session, "artifact", wanted.name)
            return [f"{wanted.name}@{version.number}" for version in doomed]

        return self._database.write(work)

    def set_alias(self, name: str, alias: str, version: int) -> Artifact:
        """Point an alias at a version, in one step if it pointed elsewhere. Raises NotFound."""
        naming.check_name(name, "artifact")
        naming.check_alias(alias)

        def work(session: Session) -> Artifact:
            moved = naming.set_alias(session, "artifact", name, alias, version)
            relist(session, "artifact", name)
            return _artifacts(session, [moved.id])[0]

        return self._database.write(work)

    def remove_alias(self, name: str, alias: str) -> None:
        """Raises NotFound."""
        naming.check_name(name, "artifact")
        naming.check_alias(alias)

        def work(session: Session) -> None:
            naming.remove_alias(session, "artifact", name, alias)
            relist(session, "artifact", name)

        self._database.write(work)

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
            artifacts = _artifacts(session, list(session.scalars(select(ArtifactRow.version_id))))
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

    def _changed(self, session: Session, version: Version) -> Artifact:
        """The version after a change of what describes it. Raises PayloadTooLarge, LibraryFull."""
        relist(session, "artifact", version.named.name)
        session.flush()
        artifact = _artifacts(session, [version.id])[0]
        check_storable(artifact.metadata, self.limits)
        nbytes = len(artifact.metadata.document())
        check_room(session, self.limits, nbytes=nbytes - version.nbytes)
        version.nbytes = nbytes
        return artifact

    def _remove_unused(self, stored: Stored, session: Session) -> bool:
        _lock_blobs(session, shared=False)
        if session.scalar(select(exists().where(ArtifactRow.blob == stored.digest))):
            return False
        self._blobs.remove(stored)
        return True

    def _check_room(self, session: Session, named: Named | None, data: bytes, document: str, content: str) -> None:
        """Raises LibraryFull, unless the version is there already."""
        if named is not None and naming.same_content(session, named, content) is not None:
            return
        known = session.scalar(select(exists().where(ArtifactRow.blob == digest_of(data))))
        check_room(session, self.limits, names=named is None or not naming.has_versions(session, named), versions=1,
                   nbytes=len(document) + (0 if known else len(data)))

    def _insert(self, metadata: Metadata, document: str, payload: Payload, data: bytes, content: str,
                session: Session) -> Artifact:
        """The new version, or the old one of the same content."""
        _lock_blobs(session, shared=True)
        named = naming.take_name(session, "artifact", metadata.name)
        version = naming.same_content(session, named, content)
        if version is None:
            self._check_room(session, named, data, document, content)
            blob = digest_of(data)
            if not self._blobs.exists(blob):
                # `gc` took it in between; from here on the lock keeps it out.
                self._blobs.put(data)
            version = naming.add_version(session, named, content, len(document))
            session.add(ArtifactRow(
                version=version, blob=blob, nbytes=len(data), layers=list(payload.layers), kind=metadata.kind,
                op=metadata.op, site=metadata.site, model_id=metadata.model_id, description=metadata.description,
                card=metadata.card, document=document, tags=_tags(metadata.tags)))
            relist(session, "artifact", metadata.name)
        return _artifacts(session, [version.id])[0]


def _meant(session: Session, ref: Ref) -> tuple[str, str]:
    """The version that a reference means, and the state of its card."""
    version = naming.resolve(session, "artifact", ref)
    card = session.scalar(select(ArtifactRow.card).where(ArtifactRow.version_id == version.id))
    return f"{version.named.name}@{version.number}", _state(card)


def _state(card: Any) -> str:
    """Equal for equal cards."""
    return "" if card is None else hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def cached_bytes(source: Source, card: Any = None) -> int:
    """What a source takes in the cache: its numbers, its card (read, and as curves) and, as much as thousands of small
    ones need, the rest."""
    return source.payload.nbytes + SOURCE_BYTES + (0 if card is None else CARD_FACTOR * len(json.dumps(card)))


def _tags(tags: tuple[str, ...]) -> list[Tag]:
    return [Tag(tag=tag, position=position) for position, tag in enumerate(tags)]


def _lock_blobs(session: Session, *, shared: bool) -> None:
    session.execute(select(Setting).where(Setting.key == "blobs").with_for_update(read=shared))


def _artifacts(session: Session, version_ids: list[int]) -> list[Artifact]:
    """Artifacts in the order of `version_ids`."""
    rows = {row.version_id: row for row in session.scalars(
        select(ArtifactRow).where(ArtifactRow.version_id.in_(version_ids)))}
    aliases = naming.aliases_of(session, version_ids)
    return [_artifact(rows[n], aliases.get(n, ())) for n in version_ids]


def _artifact(row: ArtifactRow, aliases: tuple[str, ...]) -> Artifact:
    try:
        created = Metadata.model_validate_json(row.document)
    except ValidationError as error:
        raise LibraryUnavailable(f"the metadata of version {row.version.number} of an artifact cannot be read: "
                                 f"{error}") from error
    metadata = created.model_copy(update={"description": row.description, "card": row.card,
                                          "tags": tuple(tag.tag for tag in row.tags)})
    return Artifact(metadata, row.version.number, row.blob, row.nbytes, tuple(row.layers), aliases,
                    row.version.created_at)
