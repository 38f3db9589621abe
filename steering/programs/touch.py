"""Which tokens: scopes + prompt (length, ids, roles) -> one bit an intervention for every token of a completion.

Everything is decided by a token's *position* in prompt + completion, never by the phase or chunk in which an engine
happens to process it. So chunked prefill, preemption with recompute, padding and n > 1 cannot change what is touched.

Rules by generated token id are the exception: the id is known only when the token has been sampled. They are kept as a
sparse table (`TokenRules`) that engines join with the ids of the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from steering.language.errors import InvalidSpec, Path
from steering.language.scope import GenerationPick, GenerationSelection, PromptPick, PromptSelection, Scope

Bits = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TouchMap:
    """Bits by position for one completion; bit j belongs to intervention j.

    on, off: uint32 `[prompt_length + max_new_tokens]`. A token is touched by intervention j if bit j is set in
    `(on | rules.on[token]) & ~(off | rules.off[token])`, where the rules apply to generated tokens only.
    """

    prompt_length: int
    on: Bits
    off: Bits


@dataclass(frozen=True)
class TokenRules:
    """Bits by id of a generated token: `on` adds the token, `off` takes it out."""

    on: Mapping[int, int]
    off: Mapping[int, int]

    def __bool__(self) -> bool:
        return bool(self.on or self.off)

    def bits(self, token_ids: npt.NDArray[np.int64]) -> tuple[Bits, Bits]:
        """What the generated tokens `token_ids [T]` get and lose, `[T]` each."""
        return _looked_up(self._tables[0], token_ids), _looked_up(self._tables[1], token_ids)

    @cached_property
    def _tables(self) -> "tuple[Table, Table]":
        return _table(self.on), _table(self.off)


# Token ids in rising order, and the bits of each.
Table = tuple[npt.NDArray[np.int64], Bits]


def _table(rules: Mapping[int, int]) -> Table:
    keys = sorted(rules)
    return np.array(keys, dtype=np.int64), np.array([rules[key] for key in keys], dtype=np.uint32)


def _looked_up(table: Table, token_ids: npt.NDArray[np.int64]) -> Bits:
    keys, bits = table
    if not len(keys):
        return np.zeros(len(token_ids), dtype=np.uint32)
    place = np.searchsorted(keys, token_ids).clip(max=len(keys) - 1)
    return np.where(keys[place] == token_ids, bits[place], np.uint32(0))


def token_rules(scopes: Sequence[Scope]) -> TokenRules:
    """The rules by token id in the generation part of the scopes."""
    on: dict[int, int] = {}
    off: dict[int, int] = {}
    for j, scope in enumerate(scopes):
        if isinstance(scope.generation, GenerationSelection):
            for token in scope.generation.token_ids or ():
                on[token] = on.get(token, 0) | 1 << j
            for token in (scope.generation.exclude.token_ids or ()) if scope.generation.exclude else ():
                off[token] = off.get(token, 0) | 1 << j
    return TokenRules(on, off)


def touch_map(scopes: Sequence[Scope], prompt_ids: Sequence[int], max_new_tokens: int,
              roles: Sequence[str] | None = None) -> TouchMap:
    """Bits for every position of a prompt and up to `max_new_tokens` generated tokens.

    Raises:
        InvalidSpec: a scope names roles and the prompt has none, or a position that the prompt does not have.
    """
    length = len(prompt_ids)
    ids = np.asarray(prompt_ids, dtype=np.int64)
    role_of = None if roles is None else np.asarray(roles)
    on = np.zeros(length + max_new_tokens, dtype=np.uint32)
    off = np.zeros(length + max_new_tokens, dtype=np.uint32)
    for j, scope in enumerate(scopes):
        bit = np.uint32(1 << j)
        where: Path = ("interventions", j, "scope")
        on[:length][_prompt_mask(scope.prompt, ids, role_of, (*where, "prompt"))] |= bit
        picked, excluded = _generation_masks(scope.generation, max_new_tokens)
        on[length:][picked] |= bit
        off[length:][excluded] |= bit
    return TouchMap(length, on, off)


def bits_at(touch: TouchMap, rules: TokenRules, positions: npt.NDArray[np.int64], token_ids: npt.NDArray[np.int64]
            ) -> Bits:
    """Bits of the tokens `token_ids` at `positions` of one completion (both `[T]`)."""
    on, off = touch.on[positions], touch.off[positions]
    if rules:
        generated = positions >= touch.prompt_length
        gets, loses = rules.bits(token_ids[generated])
        on[generated] |= gets
        off[generated] |= loses
    return on & ~off


def count_bits(bits: Bits, num_interventions: int) -> list[int]:
    """How many tokens have bit j, for each j."""
    return [int(np.count_nonzero(bits & np.uint32(1 << j))) for j in range(num_interventions)]


def _prompt_mask(part: str | PromptSelection, ids: npt.NDArray[np.int64], roles: npt.NDArray[np.str_] | None,
                 where: Path) -> Mask:
    if isinstance(part, str):
        return np.full(len(ids), part == "all")
    mask = _pick_prompt(part, ids, roles, where)
    if _names_nothing(part):
        mask[:] = True
    if part.exclude is not None:
        mask &= ~_pick_prompt(part.exclude, ids, roles, (*where, "exclude"))
    return mask


def _pick_prompt(pick: PromptPick, ids: npt.NDArray[np.int64], roles: npt.NDArray[np.str_] | None, where: Path) -> Mask:
    length = len(ids)
    mask = np.zeros(length, dtype=bool)
    for position in pick.positions or ():
        if not -length <= position < length:
            raise InvalidSpec(f"position {position} lies outside of the prompt, which has {length} tokens",
                              param=(*where, "positions"), value=position,
                              fix="Use a window for 'up to that many tokens'.")
        mask[position] = True
    for start, stop in pick.windows or ():
        mask[slice(start, stop)] = True
    if pick.token_ids:
        mask |= np.isin(ids, pick.token_ids)
    if pick.roles:
        if roles is None:
            raise InvalidSpec("this prompt has no chat roles", param=(*where, "roles"),
                              fix="Use /v1/chat/completions, or pick tokens by position.")
        mask |= np.isin(roles, pick.roles)
    return mask


def _generation_masks(part: str | GenerationSelection, length: int) -> tuple[Mask, Mask]:
    if isinstance(part, str):
        return np.full(length, part == "all"), np.zeros(length, dtype=bool)
    picked = _pick_generation(part, length)
    if _names_nothing(part):
        picked[:] = True
    excluded = np.zeros(length, dtype=bool) if part.exclude is None else _pick_generation(part.exclude, length)
    return picked, excluded


def _pick_generation(pick: GenerationPick, length: int) -> Mask:
    mask = np.zeros(length, dtype=bool)
    for position in pick.positions or ():
        if position < length:
            mask[position] = True
    for start, stop in pick.windows or ():
        mask[slice(start, stop)] = True
    return mask


def _names_nothing(pick: PromptPick | GenerationPick) -> bool:
    named = bool(pick.positions or pick.windows or pick.token_ids)
    return not (named or (isinstance(pick, PromptPick) and bool(pick.roles)))
