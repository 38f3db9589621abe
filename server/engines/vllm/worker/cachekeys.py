"""Keys of cached prefixes: the hash of a block includes what a program did to the tokens of this block.

Blocks before the first touched token keep vLLM's own hash and are shared with everybody, so a program that acts on
generated tokens alone reuses the cache of the plain prompt.
"""

import hashlib
from typing import Any

import numpy as np

from server.engines.vllm.wire import EXTRA, carried_by, touch_of
from steering.programs.touch import Touch

_ATTRIBUTE = "_trimtab_touch"


def wrap(module: Any) -> None:
    """Make `module.generate_block_hash_extra_keys` add ours. Does nothing the second time."""
    stock = module.generate_block_hash_extra_keys
    if getattr(stock, "trimtab", False):
        return

    def generate_block_hash_extra_keys(request: Any, start: int, end: int, first_item: int) -> Any:
        keys, next_item = stock(request, start, end, first_item)
        ours = block_key(request, start, end)
        return (keys if ours is None else (*(keys or ()), (EXTRA, ours))), next_item

    generate_block_hash_extra_keys.trimtab = True  # type: ignore[attr-defined]
    module.generate_block_hash_extra_keys = generate_block_hash_extra_keys


def block_key(request: Any, start: int, end: int) -> bytes | None:
    """Hash of what happens to tokens [start, end) of a request, None where nothing does."""
    extra = carried_by(request.sampling_params)
    if "touch" not in extra:
        return None
    touch: Touch | None = getattr(request, _ATTRIBUTE, None)
    if touch is None:
        touch = touch_of(extra)
        setattr(request, _ATTRIBUTE, touch)
    known = min(end, len(touch.on))
    if touch.sections is not None and end > touch.prompt_length:
        # Program, which knows the marks, and prompt fix the sections of equal tokens, so nobody here has to be able to
        # spell them.
        known_bits = touch.on[start:known].tobytes() + touch.off[start:known].tobytes()
        return hashlib.sha256(f"{extra['digest']}|{touch.prompt_length}|".encode() + known_bits).digest()
    positions = np.arange(start, known)
    bits = touch.bits(positions, np.asarray(request.all_token_ids[start:known], dtype=np.int64))
    if not bits.any():
        return None
    return hashlib.sha256(extra["digest"].encode() + bits.tobytes()).digest()
