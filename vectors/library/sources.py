"""Artifacts in the form the compiler takes, kept in memory for as long as the library has not changed them."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock
from typing import Any

from cachetools import LRUCache
from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from steering.artifacts.payload import Payload
from steering.artifacts.source import Source
from steering.language.errors import NotFound
from vectors.artifact import Artifact
from vectors.library import naming
from vectors.library.artifacts import read_artifacts
from vectors.library.database import Database
from vectors.library.naming import Ref
from vectors.library.revision import Memory
from vectors.library.spaces import READER
from vectors.library.tables import ArtifactRow
from vectors.storage_errors import LibraryUnavailable

SOURCE_BYTES = 4096
# A card that was read takes a few times what it takes as text.
CARD_FACTOR = 8
MOST_MADE_FOR = 16_384
MOST_MEANT = 2**17


@dataclass(frozen=True)
class MadeFor:
    """The model that an artifact was made on, as far as it records that. d_model: of artifacts at residual sites."""

    fingerprint: str | None
    d_model: int | None


class Sources:
    """Safe to use from several threads.

    Args:
        payload: reads the numbers of a version.
        cache_bytes: memory for sources lately used.
    """

    def __init__(self, database: Database, payload: Callable[[Artifact], Payload], cache_bytes: int) -> None:
        self._database = database
        self._payload = payload
        # What references mean: version and state of the card. Of what a source holds, only the card can change.
        self._meant: Memory[tuple[str, str]] = Memory(database, MOST_MEANT)
        # With the state of the card it was made from and the bytes it takes.
        self._cache: LRUCache[str, tuple[Source, str, int]] = LRUCache(cache_bytes, getsizeof=lambda kept: kept[2])
        # By version, of which none ever changes and no number is given out again.
        self._made_for: LRUCache[int, MadeFor] = LRUCache(MOST_MADE_FOR)
        self._lock = Lock()

    def get(self, ref: str) -> Source:
        """The version that `ref` means, from memory where the library has not changed and the numbers are still there.

        Raises:
            InvalidRequest, NotFound, CorruptBlob, LibraryUnavailable.
        """
        parsed = Ref.parse(ref, "artifact")
        # What is not found is not kept, so the memory holds what a reader may know under a key of that.
        key, state = self._meant.get((ref, READER.get().reads(parsed.name)), lambda session: _meant(session, parsed))
        with self._lock:
            cached = self._cache.get(key)
        if cached is not None and cached[1] == state:
            return cached[0]
        with self._database.read() as session:
            artifact = read_artifacts(session, [naming.resolve(session, "artifact", parsed).id])[0]
        key, card = artifact.ref, artifact.metadata.card
        with self._lock:
            cached = self._cache.get(key)
        payload = self._payload(artifact) if cached is None else cached[0].payload
        try:
            source = artifact.to_source(payload)
        except ValidationError as error:
            raise LibraryUnavailable(f"the calibration of {key} cannot be read: {error}",
                                     fix="Calibrate it anew.") from error
        nbytes = source.payload.nbytes + SOURCE_BYTES + (0 if card is None else CARD_FACTOR * len(json.dumps(card)))
        with self._lock:
            if nbytes <= self._cache.maxsize:
                self._cache[key] = source, _state(card), nbytes
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
                with self._lock:
                    known = self._made_for.get(version.id)
                if known is None:
                    metadata = read_artifacts(session, [version.id])[0].metadata
                    known = MadeFor(metadata.fingerprint, metadata.d_model)
                    with self._lock:
                        self._made_for[version.id] = known
                found[ref] = known
        return found


def _meant(session: Session, ref: Ref) -> tuple[str, str]:
    """The version that a reference means, and the state of its card."""
    version = naming.resolve(session, "artifact", ref)
    card = session.scalar(select(ArtifactRow.card).where(ArtifactRow.version_id == version.id))
    return f"{version.named.name}@{version.number}", _state(card)


def _state(card: Any) -> str:
    """A digest, which is the same for equal cards."""
    return "" if card is None else hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
