"""Presets: specs under a name, versioned and immutable, with aliases like artifacts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from threading import Lock

from cachetools import LRUCache
from sqlalchemy import select
from sqlalchemy.orm import Session

from steering.language.errors import InvalidRequest, PayloadTooLarge
from steering.language.spec import Spec
from vectors.artifact import Limits
from vectors.library import naming
from vectors.library.audit.notes import note
from vectors.library.database import Database
from vectors.library.listing import holds, relist
from vectors.library.naming import Ref
from vectors.library.paging import Page
from vectors.library.quota import check_room
from vectors.library.revision import Memory
from vectors.library.spaces import FOR_ALL, READER, SHARED, Reader, check_shown, space_of
from vectors.library.specs import check_refs, from_json, named_in, refs_of, to_json
from vectors.library.tables import Named, PresetRow, PresetUse, Version
from vectors.library.versioned import Versioned

MAX_SPEC_BYTES = 16 * 2**20
MAX_DESCRIPTION = 8192
MOST_MEANT = 16_384
CACHE_BYTES = 128 * 2**20
# A spec takes a few times more memory when it was read than as text, because every number is an object of its own.
BYTES_A_CHARACTER, SPEC_BYTES = 4, 4096


@dataclass(frozen=True)
class Preset:
    """One version of a preset."""

    name: str
    version: int
    spec: Spec
    description: str
    digest: str
    aliases: tuple[str, ...]
    created_at: datetime

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Meant:
    """What a reference to a preset means, without the spec."""

    name: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    created_at: datetime

    @classmethod
    def of(cls, session: Session, ref: Ref) -> "Meant":
        version = naming.resolve(session, "preset", ref)
        aliases = naming.aliases_of(session, [version.id]).get(version.id, ())
        return cls(version.named.name, version.number, version.digest, aliases, version.created_at)


class Presets(Versioned[Preset]):
    """Presets are immutable. A new spec under a known name is a new version."""

    collection = "preset"
    row = PresetRow

    def __init__(self, database: Database, limits: Limits) -> None:
        super().__init__(database, limits)
        # What references mean, and specs by their content, which never changes, with the bytes that each takes.
        self._meant: Memory[Meant] = Memory(database, MOST_MEANT)
        self._kept: LRUCache[str, tuple[Preset, int]] = LRUCache(CACHE_BYTES, getsizeof=lambda kept: kept[1])
        self._lock = Lock()

    def create(self, name: str, spec: Spec, description: str = "") -> Preset:
        """Store a new version. The same spec and description again give the version that holds them already.

        Raises:
            InvalidRequest: name, description or spec. NotFound: the spec names an artifact that is not there.
            LibraryFull: there is no room for it.
        """
        document = self.check(name, spec, description)
        digest = hashlib.sha256(f"{document}\n{description}".encode()).hexdigest()

        def work(session: Session) -> Preset:
            check_refs(session, spec)
            readers = Reader(space_of(name)) if space_of(name) != SHARED else FOR_ALL
            check_shown(named_in(spec), readers, f"all who read the preset {name}")
            named = naming.take_name(session, "preset", name, self._database.model)
            version = naming.same_content(session, named, digest)
            if version is None:
                check_room(session, self.limits, name, names=not naming.has_versions(session, named), versions=1,
                           nbytes=len(document))
                version = naming.add_version(session, named, digest, len(document))
                uses = sorted({(ref.name, ref.selector) for _, ref in refs_of(spec)})
                session.add(PresetRow(version=version, description=description, spec=document,
                                      uses=[PresetUse(name=used, selector=selector) for used, selector in uses]))
                relist(session, named)
                note(session, "preset.create", f"{name}@{version.number}", after={
                    "digest": digest, "description": description, "spec": json.loads(document)})
            return self._read(session, [version.id])[0]

        return self._database.write(work)

    def check(self, name: str, spec: Spec, description: str = "") -> str:
        """What `create` looks at before it asks the database; the spec as it is stored. Raises InvalidRequest."""
        naming.check_written(name, "name")
        if len(description) > MAX_DESCRIPTION or any(not (c.isprintable() or c in "\n\t") for c in description):
            raise InvalidRequest(f"a description is printable text of at most {MAX_DESCRIPTION} characters",
                                 param="description")
        document = to_json(spec)
        if len(document) > MAX_SPEC_BYTES:
            raise PayloadTooLarge(f"the spec takes more than {MAX_SPEC_BYTES} bytes", param="spec",
                                  fix="Store large inline numbers as artifacts.")
        return document

    def resolve(self, ref: str) -> Preset:
        """What `ref` means now, from memory where the library has not changed. Raises NotFound."""
        parsed = Ref.parse(ref, "preset")
        # What is not found is not kept, so the memory holds what a reader may know under a key of that.
        meant = self._meant.get((ref, READER.get().reads(parsed.name)), lambda session: Meant.of(session, parsed))
        with self._lock:
            kept = self._kept.get(meant.digest)
        if kept is not None:
            return replace(kept[0], name=meant.name, version=meant.version, aliases=meant.aliases,
                           created_at=meant.created_at)
        with self._database.read() as session:
            preset = self._read(session, [naming.resolve(session, "preset", parsed).id])[0]
        size = BYTES_A_CHARACTER * len(to_json(preset.spec)) + SPEC_BYTES
        with self._lock:
            if size <= self._kept.maxsize:
                self._kept[preset.digest] = preset, size
        return preset

    def list(self, *, q: str | None = None, everything: bool = False, order: str = "name", limit: int = 50,
             cursor: str | None = None) -> Page[Preset]:
        """One preset per name: the version that the bare name means. `q` is searched in name and description.
        everything: also those of other models than the one that is served."""
        return self._page([] if q is None else [holds(naming.searchable(q, "q"))], everything, order, limit, cursor)

    def _read(self, session: Session, version_ids: Sequence[int]) -> Sequence[Preset]:
        found = session.execute(select(PresetRow, Named.name).join(Version, Version.id == PresetRow.version_id)
                                .join(Named, Named.id == Version.named_id).where(PresetRow.version_id.in_(version_ids)))
        rows = {row.version_id: (row, name) for row, name in found}
        aliases = naming.aliases_of(session, version_ids)
        return [_preset(*rows[n], aliases.get(n, ())) for n in version_ids]


def _preset(row: PresetRow, name: str, aliases: tuple[str, ...]) -> Preset:
    spec = from_json(row.spec, f"the stored spec of {name}@{row.version.number}")
    return Preset(name, row.version.number, spec, row.description, row.version.digest, aliases, row.version.created_at)
