"""Which tokens the interventions of a program act on, for both engines.

A token is chosen by its position in prompt and completion, never by the step or chunk in which an engine happens to
process it. Therefore chunked prefill, recomputation after preemption, padding and n > 1 cannot change what is touched.
Rules by the id of a generated token are the exception, because that id is known only once the token has been sampled.
They are kept beside the map of positions as a small table, which is looked up as tokens come.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from steering.language.errors import InvalidSpec, Path
from steering.language.scope import GenerationPick, GenerationSelection, PromptPick, PromptSelection, Scope

Bits = npt.NDArray[np.uint32]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
# Runs of positions and rules as numbers that any serialiser knows; see `Touch.to_plain`.
Plain = dict[str, Any]


@dataclass(frozen=True)
class Touch:
    """Which interventions act on each token of one completion. Bit j belongs to intervention j.

    on, off: by position of prompt and completion. Intervention j acts on a token where bit j is set in
    `(on | gets) & ~(off | loses)`, `gets` and `loses` being what the rules say of a generated token.
    """

    prompt_length: int
    on: Bits
    off: Bits
    rules: "TokenRules"

    @classmethod
    def of(cls, scopes: Sequence[Scope], prompt_ids: Sequence[int], max_new_tokens: int,
           roles: Sequence[str] | None = None, *, rules: "TokenRules | None" = None) -> "Touch":
        """For a prompt and up to `max_new_tokens` generated tokens.

        Args:
            roles: one for each token of the prompt, where it is a conversation.
            rules: `token_rules(scopes)`, where they are known already.

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
        return cls(length, on, off, token_rules(scopes) if rules is None else rules)

    def only(self, interventions: int) -> "Touch":
        """Of these interventions alone, given as a bit mask."""
        mask = np.uint32(interventions)
        return Touch(self.prompt_length, self.on & mask, self.off & mask, self.rules.only(interventions))

    def bits(self, positions: Ids, token_ids: Ids) -> Bits:
        """Bits of the tokens `token_ids` at `positions`, `[T]` each."""
        on, off = self.on[positions], self.off[positions]
        if self.rules:
            generated = positions >= self.prompt_length
            gets, loses = self.rules.bits(token_ids[generated])
            on[generated] |= gets
            off[generated] |= loses
        bits: Bits = on & ~off
        return bits

    def bits_of(self, token_ids: Sequence[int] | Ids) -> Bits:
        """Bits of the first tokens of prompt and completion."""
        ids = np.asarray(token_ids, dtype=np.int64)
        return self.bits(np.arange(len(ids)), ids)

    def settle(self, generated_ids: Sequence[int]) -> None:
        """Write into the map what the rules say of the first generated tokens, which are known already."""
        known = slice(self.prompt_length, self.prompt_length + len(generated_ids))
        gets, loses = self.rules.bits(np.asarray(generated_ids, dtype=np.int64))
        self.on[known] |= gets
        self.off[known] |= loses

    def to_plain(self) -> Plain:
        """Plain numbers: runs [start, stop, on, off] of positions with equal bits, without untouched stretches, and the
        rules as pairs of token and bits."""
        edges = np.flatnonzero((np.diff(self.on) != 0) | (np.diff(self.off) != 0)) + 1
        starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(self.on)]
        runs = [[a, b, int(self.on[a]), int(self.off[a])] for a, b in zip(starts, stops, strict=True)
                if a < b and (self.on[a] or self.off[a])]
        rules = [[list(pair) for pair in table.items()] for table in (self.rules.on, self.rules.off)]
        return {"prompt": self.prompt_length, "length": len(self.on), "runs": runs, "rules": rules}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], spare: int = 0) -> "Touch":
        """What `to_plain` wrote, with `spare` untouched positions more at the end."""
        on, off = (np.zeros(plain["length"] + spare, dtype=np.uint32) for _ in range(2))
        for start, stop, on_bits, off_bits in plain["runs"]:
            on[start:stop] = on_bits
            off[start:stop] = off_bits
        gets, loses = ({int(token): int(bits) for token, bits in table} for table in plain["rules"])
        return cls(plain["prompt"], on, off, TokenRules(gets, loses))


@dataclass(frozen=True)
class TokenRules:
    """Bits by id of a generated token: `on` adds the token, `off` takes it out."""

    on: Mapping[int, int]
    off: Mapping[int, int]

    def __bool__(self) -> bool:
        return bool(self.on or self.off)

    def only(self, interventions: int) -> "TokenRules":
        on, off = ({token: bits & interventions for token, bits in table.items() if bits & interventions}
                   for table in (self.on, self.off))
        return TokenRules(on, off)

    def of(self, token: int) -> tuple[int, int]:
        """What one generated token gets and loses."""
        return self.on.get(token, 0), self.off.get(token, 0)

    def bits(self, token_ids: Ids) -> tuple[Bits, Bits]:
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
