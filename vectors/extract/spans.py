"""Where the two texts of a pair differ: the tokens that carry the concept.

A chat template closes the turn after the answer, so that the last token of both texts is the same mark; and texts often
begin alike. What both have in common at their beginning and at their end is left out.
"""

from collections.abc import Sequence


def differing(positive: Sequence[int], negative: Sequence[int]) -> tuple[range, range]:
    """Positions of the differing tokens of either text, one at least: where one text only goes on behind the other, its
    last common token stands for what is not there. Position 0, which many models use as a sink, is left out of texts
    that have another."""
    shorter = min(len(positive), len(negative))
    start = 0
    while start < shorter and positive[start] == negative[start]:
        start += 1
    end = 0
    while end < shorter - start and positive[-1 - end] == negative[-1 - end]:
        end += 1
    return _within(start, len(positive) - end, len(positive)), _within(start, len(negative) - end, len(negative))


def _within(start: int, stop: int, length: int) -> range:
    start = min(max(start, 1), length - 1)
    return range(start if stop > start else max(stop - 1, min(1, length - 1)), max(stop, start + 1))
