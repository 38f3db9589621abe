"""Which tokens the interventions of a program act on, for both engines.

A token is chosen by its position in prompt and completion, never by the step or chunk in which an engine happens to
process it. Therefore chunked prefill, recomputation after preemption, padding and n > 1 cannot change what is touched.
Rules by the id of a generated token and by its section are the exception, because these are known only once the token
has been sampled. They are kept beside the map of positions and are looked up as tokens come.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from steering.language.errors import InvalidSpec, Path
from steering.language.scope import GenerationPick, GenerationSelection, PromptPick, PromptSelection, Scope
from steering.language.vocabulary import Section
from steering.programs.sections import SectionRules, Sections

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
    sections: the rules by section, which remember the tokens of this completion.
    """

    prompt_length: int
    on: Bits
    off: Bits
    rules: "TokenRules"
    sections: SectionRules | None = None

    @classmethod
    def of(cls, scopes: Sequence[Scope], prompt_ids: Sequence[int], max_new_tokens: int,
           roles: Sequence[str] | None = None, *, rules: "TokenRules | None" = None,
           sections: Sections | None = None) -> "Touch":
        """For a prompt and up to `max_new_tokens` generated tokens.

        Args:
            roles: one for each token of the prompt, where it is a conversation.
            rules: `token_rules(scopes)`, where they are known already.
            sections: how sections are told.

        Raises:
            InvalidSpec: a scope names roles and the prompt has none, or a position that the prompt does not have, or
                sections that cannot be told.
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
        return cls(length, on, off, token_rules(scopes) if rules is None else rules, _section_rules(scopes, sections))

    def only(self, interventions: int) -> "Touch":
        """Of these interventions alone, given as a bit mask."""
        mask = np.uint32(interventions)
        return Touch(self.prompt_length, self.on & mask, self.off & mask, self.rules.only(interventions),
                     None if self.sections is None else self.sections.only(interventions))

    @property
    def ruled(self) -> bool:
        """Whether more than the position of a generated token decides."""
        return bool(self.rules) or self.sections is not None

    def of_generated(self, index: int, token: int) -> tuple[int, int]:
        """What the rules give to generated token number `index`, and what they take from it. All before it must have
        been asked for."""
        gets, loses = self.rules.of(token)
        if self.sections is not None:
            more, less = self.sections.of(index, token)
            gets, loses = gets | more, loses | less
        return gets, loses

    def bits(self, positions: Ids, token_ids: Ids) -> Bits:
        """Bits of the tokens `token_ids` at `positions`, `[T]` each. Where sections count, the positions follow one
        upon the other, and those before them have been asked for."""
        on, off = self.on[positions], self.off[positions]
        if self.rules:
            generated = positions >= self.prompt_length
            gets, loses = self.rules.bits(token_ids[generated])
            on[generated] |= gets
            off[generated] |= loses
        if self.sections is not None:
            for place in np.flatnonzero(positions >= self.prompt_length).tolist():
                more, less = self.sections.of(int(positions[place]) - self.prompt_length, int(token_ids[place]))
                on[place] |= np.uint32(more)
                off[place] |= np.uint32(less)
        bits: Bits = on & ~off
        return bits

    def bits_of(self, token_ids: Sequence[int] | Ids) -> Bits:
        """Bits of the first tokens of prompt and completion."""
        ids = np.asarray(token_ids, dtype=np.int64)
        return self.bits(np.arange(len(ids)), ids)

    def settle(self, generated_ids: Sequence[int]) -> None:
        """Write into the map what the rules say of the first generated tokens, which are known already."""
        for index, token in enumerate(generated_ids):
            gets, loses = self.of_generated(index, token)
            self.on[self.prompt_length + index] |= np.uint32(gets)
            self.off[self.prompt_length + index] |= np.uint32(loses)

    def to_plain(self) -> Plain:
        """Plain numbers: runs [start, stop, on, off] of positions with equal bits, without untouched stretches, and the
        rules as pairs of token and bits."""
        edges = np.flatnonzero((np.diff(self.on) != 0) | (np.diff(self.off) != 0)) + 1
        starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(self.on)]
        runs = [[a, b, int(self.on[a]), int(self.off[a])] for a, b in zip(starts, stops, strict=True)
                if a < b and (self.on[a] or self.off[a])]
        rules = [[list(pair) for pair in table.items()] for table in (self.rules.on, self.rules.off)]
        plain: Plain = {"prompt": self.prompt_length, "length": len(self.on), "runs": runs, "rules": rules}
        return plain if self.sections is None else {**plain, "sections": self.sections.to_plain()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], spare: int = 0,
                   spell: Callable[[int], str] = lambda token: "") -> "Touch":
        """What `to_plain` wrote, with `spare` untouched positions more at the end. spell: as `Sections` have it."""
        on, off = (np.zeros(plain["length"] + spare, dtype=np.uint32) for _ in range(2))
        for start, stop, on_bits, off_bits in plain["runs"]:
            on[start:stop] = on_bits
            off[start:stop] = off_bits
        gets, loses = ({int(token): int(bits) for token, bits in table} for table in plain["rules"])
        sections = SectionRules.from_plain(plain["sections"], spell) if "sections" in plain else None
        return cls(plain["prompt"], on, off, TokenRules(gets, loses), sections)


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


def names_sections(scope: Scope) -> bool:
    part = scope.generation
    return isinstance(part, GenerationSelection) and bool(
        part.sections or (part.exclude is not None and part.exclude.sections))


def _section_rules(scopes: Sequence[Scope], sections: Sections | None) -> SectionRules | None:
    on: dict[Section, int] = {}
    off: dict[Section, int] = {}
    for j, scope in enumerate(scopes):
        if not names_sections(scope) or not isinstance(scope.generation, GenerationSelection):
            continue
        if sections is None:
            raise InvalidSpec("sections are told apart in completions alone",
                              param=("interventions", j, "scope", "generation", "sections"),
                              fix="Pick tokens by position or window.")
        exclude = scope.generation.exclude
        for table, named in ((on, scope.generation.sections), (off, exclude.sections if exclude else None)):
            for section in named or ():
                table[section] = table.get(section, 0) | 1 << j
    return SectionRules(sections, on, off) if sections is not None and (on or off) else None


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
    more = pick.roles if isinstance(pick, PromptPick) else pick.sections
    return not (named or more)
