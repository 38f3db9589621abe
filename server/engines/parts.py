"""A completion whose program changed while it was generated, as guards and the kill switch change it, has parts."""

from collections.abc import Sequence
from dataclasses import dataclass

from steering.programs.program import Program


@dataclass(frozen=True)
class Part:
    """Generated tokens from `start` on were made under `program`."""

    start: int
    program: Program


def spans(parts: Sequence[Part], count: int) -> list[tuple[Part, int]]:
    """Each part of `count` generated tokens with where it ends; parts without a token are left out."""
    stops = [*(part.start for part in parts[1:]), count]
    return [(part, stop) for part, stop in zip(parts, stops, strict=True) if stop > part.start]
