"""The versioned library: artifacts, presets and switches under names, in a database and a store of blobs."""

from vectors.library.library import Collected, Filter, Library
from vectors.library.sources import MadeFor

__all__ = ["Collected", "Filter", "Library", "MadeFor"]
