"""Tokens that each intervention of a completion acted on."""

from collections.abc import Sequence

import numpy as np

from server.engines.data import CompareRequest, Touched
from steering.programs.program import Program
from steering.programs.touch import Touch, count_bits


def count_touched(given: Program | None, touch: Touch | None, token_ids: Sequence[int], processed: int
                  ) -> list[Touched]:
    """Per intervention of `given`, tokens among the first `processed` of `token_ids`; one without rows has none.

    touch: None where nothing of the program acts.
    """
    if given is None:
        return []
    if touch is None:
        return [Touched(0, 0) for _ in given.compiled]
    bits = touch.bits_of(token_ids[:processed])
    prompt = count_bits(bits[:touch.prompt_length], len(given.compiled))
    generated = count_bits(bits[touch.prompt_length:], len(given.compiled))
    return [Touched(p, g) for p, g in zip(prompt, generated, strict=True)]


def first_touched(request: CompareRequest) -> int:
    """Position of the first token that the program acts on; the number of tokens where it acts on none. Whatever is
    computed of the tokens before it is what the untouched model computes."""
    program, prompt = request.program, request.token_ids[:request.prompt_length]
    length = len(request.token_ids)
    if not program.acting:
        return length
    touched = np.flatnonzero(program.touch(prompt, length - len(prompt), request.roles).bits_of(request.token_ids))
    return int(touched[0]) if len(touched) else length


def same_rows(request: CompareRequest) -> int:
    """How many of the generated tokens were predicted before the program touched any, and so by the untouched model."""
    count = len(request.token_ids) - request.prompt_length
    return min(max(first_touched(request) - request.prompt_length + 1, 0), count)
