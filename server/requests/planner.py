"""From what a request says about steering to a compiled program: default spec, presets, interventions, kill switch."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal

from cachetools import LRUCache

from server.errors import DefaultSpecUnusable
from server.requests.killswitch import KillSwitch
from server.requests.monitor import Monitor
from server.settings import Settings
from steering.artifacts.source import Resolved, Source
from steering.language.errors import InvalidSpec, Path, PayloadTooLarge, TrimtabError, path_text
from steering.language.gates import Gates
from steering.language.guard import Guard
from steering.language.intervention import Intervention
from steering.language.scope import PromptSelection, Scope
from steering.language.spec import Spec, Steering
from steering.models.facts import ModelFacts
from steering.programs.compiler import compile_program
from steering.programs.gate import gates_of
from steering.programs.program import Program
from steering.programs.reading import compile_reader
from steering.programs.touch import Touch
from vectors.library import Library

Origin = Literal["default", "model", "preset", "request"]
NUMBERS = {int, float}
INTERVENTION_BYTES, SCOPE_BYTES_A_CHARACTER = 4096, 16


@dataclass(frozen=True)
class Planned:
    """One intervention with where it came from; `path` is its place in the request."""

    intervention: Intervention
    origin: Origin
    path: Path
    preset: str | None = None


@dataclass(frozen=True)
class Plan:
    """What one request applies.

    Attributes:
        program: None where nothing is applied.
        planned: one entry per intervention of the program.
        disabled: why the kill switch held the steering back, else None.
        presets: resolved presets by what named them ("model", "preset").
        monitors: what to read of the finished completion.
        guards: limits, all of which hold. resolved: what the program was compiled from.
    """

    program: Program | None
    planned: tuple[Planned, ...] = ()
    disabled: str | None = None
    presets: Mapping[str, str] | None = None
    report: Literal["none", "summary", "tokens"] = "none"
    monitors: tuple[Monitor, ...] = ()
    guards: tuple[Guard, ...] = ()
    resolved: tuple[Resolved, ...] = ()

    @property
    def names_roles(self) -> bool:
        return any(_names_roles(item.intervention.scope) for item in self.planned)

    def check_prompt(self, prompt_ids: Sequence[int], roles: Sequence[str] | None) -> None:
        """Refuse scopes that do not fit the prompt. Raises InvalidSpec."""
        if self.program is not None:
            try:
                Touch.of(self.program.scopes, prompt_ids, 0, roles)
            except TrimtabError as error:
                raise localised(error, self.planned) from None

    def placed(self, error: TrimtabError) -> TrimtabError:
        """What an engine says of an intervention of the program, in the words of the request; other errors as they
        are."""
        return error if _intervention(error) is None else localised(error, self.planned)


class Planner:
    """Resolves and compiles; compiled programs are kept for reuse. Methods block: call them in a thread."""

    def __init__(self, settings: Settings, library: Library, facts: ModelFacts, kill_switch: KillSwitch) -> None:
        self._settings = settings
        self._library = library
        self._facts = facts
        self._kill_switch = kill_switch
        self._programs: LRUCache[str, Program] = LRUCache(settings.program_cache_bytes, getsizeof=program_bytes)
        self._barred: tuple[Spec, str] | None = None
        self._lock = Lock()

    def plan(self, steering: Steering, model_preset: str | None) -> Plan:
        """The plan of a request.

        Raises:
            TrimtabError: `path` is the place in the request, ("steering", "interventions", 1, "layers") for example.
        """
        monitors = tuple(self._monitor(ref, i) for i, ref in enumerate(steering.monitor))
        disabled = self._kill_switch.reason
        if disabled is not None:
            # Reading changes nothing, so it goes on.
            return Plan(None, disabled=disabled, report=steering.report, monitors=monitors)
        if steering.default == "none" and model_preset is not None:
            raise InvalidSpec('default "none" means no steering at all, and the model name asks for a preset',
                              param=("steering", "default"), fix="Use the base model's name.")
        planned, presets, guards = self._collect(steering, model_preset)
        if not planned:
            return Plan(None, presets=presets, report=steering.report, monitors=monitors)
        program, resolved = self._compiled(planned)
        return Plan(program, tuple(planned), presets=presets, report=steering.report, monitors=monitors,
                    guards=guards, resolved=resolved)

    def weakened(self, plan: Plan, closed: Collection[int], factors: Sequence[float]) -> Program:
        """The plan's program for a prompt whose gates closed the interventions `closed`, each at a factor of its
        strength."""
        resolved = [replace(item, factor=factor) for item, factor in zip(plan.resolved, factors, strict=True)]
        return compile_program(resolved, self._facts).decided(closed)

    def default_spec(self) -> Spec | None:
        return self._library.switches.default_spec() or self._settings.default_spec

    def bar_default_spec(self, spec: Spec, reason: str) -> None:
        """Refuse what this default spec would act on, until it is another or is tried with success."""
        self._barred = spec, reason

    def unbar_default_spec(self) -> None:
        self._barred = None

    def default_spec_problem(self, spec: Spec) -> str | None:
        """Why the default spec `spec` cannot be used, None where nothing is known against it."""
        barred = self._barred
        return barred[1] if barred is not None and barred[0] == spec else None

    def check_spec(self, spec: Spec) -> Plan:
        """The plan of a spec by itself, kill switch or not. Refuses one that cannot be applied; the paths of errors
        begin at its `interventions`."""
        planned = [Planned(item, "request", ("interventions", i)) for i, item in enumerate(spec.interventions)]
        program, resolved = self._compiled(planned)
        return Plan(program, tuple(planned), guards=() if spec.guard is None else (spec.guard,), resolved=resolved)

    def _collect(self, steering: Steering, model_preset: str | None) -> tuple[
            list[Planned], dict[str, str], tuple[Guard, ...]]:
        planned: list[Planned] = []
        guards: list[Guard | None] = []
        presets: dict[str, str] = {}
        default = self.default_spec() if steering.default == "inherit" else None
        if default is not None:
            problem = self.default_spec_problem(default)
            if problem is not None:
                raise _unusable(f"failed when it was tried: {problem}", ("default_spec",))
            guards.append(default.guard)
            planned += [Planned(item, "default", ("default_spec", "interventions", i))
                        for i, item in enumerate(default.interventions)]
        named: tuple[tuple[Origin, str | None, Path], ...] = (
            ("model", model_preset, ("model",)), ("preset", steering.preset, ("steering", "preset")))
        for origin, ref, path in named:
            if ref is None:
                continue
            try:
                preset = self._library.presets.resolve(ref)
            except TrimtabError as error:
                raise error.about(*path) from None
            presets[origin] = preset.ref
            guards.append(preset.spec.guard)
            planned += [Planned(item, origin, path, preset.ref) for item in preset.spec.interventions]
        planned += [Planned(item, "request", ("steering", "interventions", i))
                    for i, item in enumerate(steering.interventions)]
        guards.append(steering.guard)
        return planned, presets, tuple(guard for guard in guards if guard is not None)

    def _compiled(self, planned: Sequence[Planned]) -> tuple[Program, tuple[Resolved, ...]]:
        for item in planned:
            self._check_inline(item)
        resolved = [Resolved(item.intervention, self._source(item), self._probes(item)) for item in planned]
        key = _key(resolved)
        with self._lock:
            program = self._programs.get(key)
        if program is None:
            try:
                program = compile_program(resolved, self._facts, most_numbers=self._settings.max_program_numbers)
            except TrimtabError as error:
                raise localised(error, planned) from None
            with self._lock:
                if program_bytes(program) <= self._programs.maxsize:
                    self._programs[key] = program
        return program, tuple(resolved)

    def _monitor(self, ref: str, index: int) -> Monitor:
        try:
            source = self._library.source(ref)
            reader = compile_reader(source, self._facts)
        except TrimtabError as error:
            raise error.about("steering", "monitor", index) from None
        own = source.reading
        return Monitor(reader, None if own is None else own.threshold, "above" if own is None else own.direction)

    def _source(self, item: Planned) -> Source | None:
        if item.intervention.artifact is None:
            return None
        try:
            return self._library.source(item.intervention.artifact)
        except TrimtabError as error:
            raise _placed(error, item, ("artifact",)) from None

    def _probes(self, item: Planned) -> tuple[Source, ...]:
        gate = item.intervention.gate
        found = []
        for n, single in enumerate(gates_of(gate)):
            try:
                found.append(self._library.source(single.probe))
            except TrimtabError as error:
                member = (gate.members[0], n) if isinstance(gate, Gates) else ()
                raise _placed(error, item, ("gate", *member, "probe")) from None
        return tuple(found)

    def _check_inline(self, item: Planned) -> None:
        limit = self._settings.max_inline_bytes
        if item.intervention.inline is not None and _inline_bytes(item.intervention.inline) > limit:
            raise _placed(PayloadTooLarge(f"the inline numbers take more than {limit} bytes", fix="Upload them once to "
                                          "/v1/artifacts and name them."), item, ("inline",))


def program_bytes(program: Program) -> int:
    """What a compiled program takes in the cache: its numbers, its scopes, which may list thousands of tokens, and, as
    much as thousands of small programs need, the rest."""
    scopes = sum(len(scope.model_dump_json(exclude_defaults=True)) for scope in program.scopes)
    return program.nbytes + SCOPE_BYTES_A_CHARACTER * scopes + INTERVENTION_BYTES * (1 + len(program.compiled))


def _key(resolved: Sequence[Resolved]) -> str:
    """Equal for what compiles to the same program. The card is a part of it: doses are read from there."""
    state = hashlib.sha256()
    for item in resolved:
        sources = [None if item.source is None else item.source.state, *(probe.state for probe in item.probes)]
        state.update(f"{sources}|{item.intervention.digest}\n".encode())
    return state.hexdigest()


def localised(error: TrimtabError, planned: Sequence[Planned]) -> TrimtabError:
    """The error with the place in the request from which intervention i came, where the compiler says
    `("interventions", i)`."""
    index = _intervention(error)
    return error.at("steering") if index is None else _placed(error, planned[index], error.path[2:])


def _intervention(error: TrimtabError) -> int | None:
    """Which intervention of the program an error is about; None where it is about something else."""
    match error.path:
        case ("interventions", int(index), *_):
            return index
    return None


def _placed(error: TrimtabError, item: Planned, field: Path) -> TrimtabError:
    if item.origin == "default":
        return _unusable(f"cannot be applied: {error.message}", (*item.path, *field))
    if item.preset is not None:
        # The fault lies in the preset; the request only named it.
        place = f"{path_text(field)}: " if field else ""
        error.message = f"preset {item.preset}: {place}{error.message}"
        return error.about(*item.path)
    return error.about(*item.path, *field)


def _unusable(what: str, param: Path) -> DefaultSpecUnusable:
    return DefaultSpecUnusable(f"the server's default spec {what}", param=param,
                               fix='Change it at /v1/admin/default-spec, or send "default": "none" or "override".')


def _names_roles(scope: Scope) -> bool:
    prompt = scope.prompt
    return isinstance(prompt, PromptSelection) and bool(
        prompt.roles or (prompt.exclude is not None and prompt.exclude.roles))


def _inline_bytes(inline: Any) -> int:
    """Bytes that inline numbers take as float32, base64 text by its length."""
    if isinstance(inline, str):
        return 3 * len(inline) // 4
    if isinstance(inline, dict):
        return sum(map(_inline_bytes, inline.values()))
    if isinstance(inline, list):
        # Numbers come by the thousand, so they are not looked at one by one.
        return 4 * len(inline) if set(map(type, inline)) <= NUMBERS else sum(map(_inline_bytes, inline))
    return 4
