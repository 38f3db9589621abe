"""Compiled programs, kept for requests that mean the same."""

import hashlib
from collections.abc import Sequence
from threading import Lock

from cachetools import LRUCache

from server.requests.plan import Planned, localised
from server.settings import Settings
from steering.artifacts.source import Resolved
from steering.language.errors import TrimtabError
from steering.models.facts import ModelFacts
from steering.programs.compiler import compile_program
from steering.programs.program import Program
from steering.programs.sections import Sections

INTERVENTION_BYTES, SCOPE_BYTES_A_CHARACTER = 4096, 16


class Programs:
    """Methods may be called by several threads."""

    def __init__(self, settings: Settings, facts: ModelFacts, sections: Sections | None) -> None:
        self._settings, self._facts, self._sections = settings, facts, sections
        self.kept: LRUCache[str, Program] = LRUCache(settings.program_cache_bytes, getsizeof=program_bytes)
        self._lock = Lock()

    def follow(self, settings: Settings) -> None:
        """Compile by these settings from now on; programs that are compiled stay."""
        self._settings = settings

    def compile(self, planned: tuple[Planned, ...]) -> Program:
        """Raises TrimtabError, whose path is the place in the request."""
        key = key_of(planned)
        with self._lock:
            program = self.kept.get(key)
        if program is None:
            try:
                program = compile_program(planned, self._facts, most_numbers=self._settings.max_program_numbers)
                program = program.within(self._sections)
            except TrimtabError as error:
                raise localised(error, planned) from None
            with self._lock:
                if program_bytes(program) <= self.kept.maxsize:
                    self.kept[key] = program
        return program


def program_bytes(program: Program) -> int:
    """What a compiled program takes in the cache: its numbers, its scopes, which may list thousands of tokens, and, as
    much as thousands of small programs need, the rest."""
    scopes = sum(len(scope.model_dump_json(exclude_defaults=True)) for scope in program.scopes)
    return program.nbytes + SCOPE_BYTES_A_CHARACTER * scopes + INTERVENTION_BYTES * (1 + len(program.compiled))


def key_of(resolved: Sequence[Resolved]) -> str:
    """Equal for what compiles to the same program. The card is a part of it: doses are read from there."""
    state = hashlib.sha256()
    for item in resolved:
        sources = [None if item.source is None else item.source.state, *(probe.state for probe in item.probes)]
        state.update(f"{sources}|{item.intervention.digest}|{item.factor!r}\n".encode())
    return state.hexdigest()
