"""Random numbers that are a function of where they are used: one per (seed, index of the token, token id).

A shared generator would give a request other numbers in another batch. Here each row of a batch has a key made from its
seed and the index of its token, and the number of a token id is the output of SplitMix64 that begins at the key (Steele
et al., "Fast splittable pseudorandom number generators", 2014). It is computed for all ids at once, on any device.
"""

from collections.abc import Sequence

import numpy as np
import torch

_GOLDEN, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SHIFTS = (30, 27, 31)


def keys(seeds: Sequence[int], counters: Sequence[int]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """One 64-bit key per (seed, counter)."""
    with np.errstate(over="ignore"):
        z = np.array(seeds, dtype=np.uint64) + (np.array(counters, dtype=np.uint64) + np.uint64(1)) * np.uint64(
            _GOLDEN % 2**64)
        for _ in range(2):  # twice, as neighbouring seeds must not give neighbouring keys
            z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST % 2**64)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND % 2**64)
            z = z ^ (z >> np.uint64(31))
    return z.view(np.int64)


def exponential(keys: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers of the exponential distribution with mean 1, `[n, size]` float32 for `keys [n]` int64.

    They come from 53 random bits each, so they are right to seven digits from 1e-10 up to 36.
    """
    steps = torch.arange(1, size + 1, dtype=torch.int64, device=keys.device).mul_(_GOLDEN)
    z = keys.unsqueeze(1) + steps
    for shift, factor in zip(_SHIFTS, (_FIRST, _SECOND, None), strict=True):
        # `>>` repeats the sign; the mask makes it the shift of an unsigned number.
        z.bitwise_xor_((z >> shift).bitwise_and_(2**(64 - shift) - 1))
        if factor is not None:
            z.mul_(factor)
    uniform = (z >> 11).bitwise_and_(2**53 - 1).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().float()
