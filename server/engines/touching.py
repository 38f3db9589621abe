"""Tokens that each intervention of a completion acted on."""

from collections.abc import Sequence

import numpy as np

from server.engines.base import Touched
from steering.programs.program import Program
from steering.programs.touch import TouchMap, bits_at, count_bits


def count_touched(given: Program | None, touch: TouchMap | None, token_ids: Sequence[int], processed: int
                  ) -> list[Touched]:
    """Per intervention of `given`, tokens among the first `processed` of `token_ids`; one without rows has none.

    touch: None where nothing of the program acts.
    """
    if given is None:
        return []
    if touch is None:
        return [Touched(0, 0) for _ in given.compiled]
    positions = np.arange(min(processed, len(token_ids)))
    bits = bits_at(touch, given.rules, positions, np.asarray(token_ids, dtype=np.int64)[positions])
    bits &= np.uint32(given.acting)
    prompt = count_bits(bits[:touch.prompt_length], len(given.compiled))
    generated = count_bits(bits[touch.prompt_length:], len(given.compiled))
    return [Touched(p, g) for p, g in zip(prompt, generated, strict=True)]
