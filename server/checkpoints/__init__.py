"""Models that must be made ready before they can be loaded: fetched from a package, turned from GGUF into a folder."""
