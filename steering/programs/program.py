"""A spec compiled for one loaded model. It has been checked against the facts of the model, and its strengths have
become numbers: one row for each site and layer at which an intervention acts."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from steering.language.scope import Scope
from steering.language.vocabulary import Op, Site
from steering.ops.base import Row
from steering.programs.gate import CompiledGate
from steering.programs.sections import Sections
from steering.programs.touch import TokenRules, Touch, names_sections, token_rules


@dataclass(frozen=True)
class Applied:
    """What the receipt says of one intervention.

    strength: value and unit as asked for, and `scale`: per layer, the factor that the unit came down to.
    card: digest of the artifact's card as it was read.
    warnings: what the artifact's card warns of.
    massive: what it does to the model's massive activations, where there is something to say.
    card_kl: KL in nats per token that the artifact's calibration measured for this setting and strength, if it did.
    card_multiple: how many times the artifact's own strength this is, at the layer where it is most; None where there
    is no own strength to compare with.
    """

    artifact: str | None
    op: Op
    sites: tuple[Site, ...]
    layers: tuple[int, ...]
    strength: Mapping[str, Any]
    options: Mapping[str, Any]
    card_kl: float | None = None
    card: str | None = None
    card_multiple: float | None = None
    warnings: tuple[str, ...] = ()
    massive: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """One intervention: the row its op reads, per (site, layer), and the tokens it touches.

    `rows` is empty when the strength is 0 or a gate closed it: the receipt names such an intervention all the
    same, and it touches nothing.
    """

    op: Op
    scope: Scope
    rows: Mapping[tuple[Site, int], Row]
    applied: Applied
    gate: CompiledGate | None = None

    @property
    def numbers(self) -> int:
        """How many numbers all rows have. A step reads each of them once, and each touched token is multiplied with it.
        """
        return sum(tensor.numel() for row in self.rows.values() for tensor in row.tensors.values())


@dataclass(frozen=True)
class Program:
    """Interventions in order. Two programs with the same digest do the same to the same tokens.

    A program with undecided gates cannot run. Engines ask for its digest and for what acts, and it raises ValueError.

    limited: the server's limit on relative steps holds for it. It does not hold for programs of the server's own, such
    as those that replace the activation of one token by that of another.
    sections: how the sections of a completion are told, where a scope names some.
    """

    compiled: tuple[Compiled, ...]
    is_decided: bool = False
    limited: bool = True
    sections: Sections | None = None

    @cached_property
    def gates(self) -> Mapping[int, CompiledGate]:
        """The gates that must be decided for a prompt before the program can run, by intervention."""
        return {} if self.is_decided else {j: item.gate for j, item in enumerate(self.compiled)
                                           if item.gate is not None and item.gate.when == "prompt"}

    def decided(self, closed: Collection[int]) -> "Program":
        """The program for one prompt: the interventions `closed` do nothing, the gates of the others are open."""
        compiled = tuple(replace(item, rows={}) if j in closed else item for j, item in enumerate(self.compiled))
        return replace(self, compiled=compiled, is_decided=True)

    def within(self, sections: Sections | None) -> "Program":
        """The program for completions whose sections are told so. The same one where no scope names sections."""
        if sections is None or not any(map(names_sections, self.scopes)):
            return self
        if sections not in self._within:
            self._within[sections] = replace(self, sections=sections)
        return self._within[sections]

    @cached_property
    def _within(self) -> "dict[Sections, Program]":
        # A few: there are as many as ways in which prompts of one model open an answer. Each keeps its digest.
        return {}

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that acts: rows, their places and order, scopes and what they depend on."""
        self._check_decided()
        state = hashlib.sha256()
        if self.sections is not None:
            state.update(self.sections.described.encode())
        for j, item in enumerate(self.compiled):
            state.update(json.dumps([j, item.scope.model_dump(mode="json")], sort_keys=True).encode())
            for (site, layer), row in sorted(item.rows.items()):
                state.update(f"{site}|{layer}|{row.kernel}".encode())
                for name, tensor in sorted(row.tensors.items()):
                    state.update(f"{name}|{tuple(tensor.shape)}".encode())
                    state.update(tensor.contiguous().numpy().tobytes())
        return state.hexdigest()

    @property
    def identity(self) -> str:
        """Programs with the same one may share a slot: they do the same, and the limit holds for both or for neither.
        """
        return self.digest if self.limited else f"{self.digest}-unlimited"

    @cached_property
    def nbytes(self) -> int:
        """Memory that the numbers take; what rows share counts once."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                    for item in self.compiled for row in item.rows.values() for tensor in row.tensors.values()}
        return sum(storages.values())

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return tuple(item.scope for item in self.compiled)

    def touch(self, prompt_ids: Sequence[int], max_new_tokens: int, roles: Sequence[str] | None = None) -> Touch:
        """Which of the interventions that act do so on each token. Raises InvalidSpec as `Touch.of`."""
        found = Touch.of(self.scopes, prompt_ids, max_new_tokens, roles, rules=self._rules, sections=self.sections)
        return found if self.acting == (1 << len(self.compiled)) - 1 else found.only(self.acting)

    @cached_property
    def _rules(self) -> TokenRules:
        return token_rules(self.scopes)

    @cached_property
    def acting(self) -> int:
        """Bit mask of the interventions that have rows."""
        self._check_decided()
        return sum(1 << j for j, item in enumerate(self.compiled) if item.rows)

    @property
    def first_acting(self) -> int:
        """The index of the first intervention that has rows. The program must have one."""
        return (self.acting & -self.acting).bit_length() - 1

    def without(self, index: int) -> "Program":
        """The same program without intervention `index`."""
        return replace(self, compiled=self.compiled[:index] + self.compiled[index + 1:])

    def _check_decided(self) -> None:
        if self.gates:
            raise ValueError("a program with undecided gates cannot run")
