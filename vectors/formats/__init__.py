"""Formats of artifact files, registered by importing them here. `torch_pt` is not: it is for the offline CLI only."""

from vectors.formats import gguf, npz, safetensors
from vectors.formats.base import Format, detect, formats, get_format

__all__ = ["Format", "detect", "formats", "get_format", "gguf", "npz", "safetensors"]
