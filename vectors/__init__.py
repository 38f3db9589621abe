"""The versioned library of artifacts, and the formats they come and go in."""

from vectors.artifact import Artifact, InvalidMetadata, Limits, Metadata, Patch
from vectors.library import Collected, Filter, Library
from vectors.library.paging import Page
from vectors.library.presets import Preset
from vectors.storage_errors import CorruptBlob, LibraryUnavailable

__all__ = ["Artifact", "Collected", "CorruptBlob", "Filter", "InvalidMetadata", "Library", "LibraryUnavailable",
           "Limits", "Metadata", "Page", "Patch", "Preset"]
