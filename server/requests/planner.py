"""From what a request says about steering to a compiled program: default spec, presets, interventions, kill switch."""

import hashlib
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from server.activations.store import StoredActivations
from server.errors import NotSteered, SteeringDisabled
from server.identity.policy import Held
from server.identity.principal import CURRENT
from server.requests import policy_gate
from server.requests.columns import Columns, with_columns
from server.requests.guard import HeldGuard
from server.requests.inline import check_inline
from server.requests.killswitch import KillSwitch
from server.requests.patching import by_token, with_rows
from server.requests.plan import (
    Origin,
    Plan,
    Planned,
    PlannedContrast,
    unusable_default,
)
from server.requests.programs import Programs, key_of
from server.requests.watching import Watching
from server.rollouts.rollouts import Arms
from server.settings import Settings
from steering.artifacts.source import Source
from steering.language.contrast import Contrast
from steering.language.errors import InvalidSpec, Path, TrimtabError
from steering.language.gates import Gates
from steering.language.guard import Guard
from steering.language.intervention import Intervention
from steering.language.spec import Spec, Steering
from steering.models.facts import ModelFacts
from steering.programs.compiler import compile_program
from steering.programs.gate import gates_of
from steering.programs.program import Program
from steering.programs.sections import Sections
from vectors.evaluate.graders.contract import Grader
from vectors.evaluate.graders.named import text_graders
from vectors.library import Library
from vectors.library.presets import Preset


class Planner:
    """Resolves and compiles; compiled programs are kept for reuse. Methods block: call them in a thread."""

    def __init__(self, settings: Settings, library: Library, facts: ModelFacts, kill_switch: KillSwitch,
                 captured: StoredActivations, sections: Sections | None = None) -> None:
        """captured: activations that patches may name. sections: how those of a completion are told where its request
        says no more."""
        self._captured = captured
        self._sections = sections
        self._settings = settings
        self._library = library
        self._facts = facts
        self._kill_switch = kill_switch
        self.programs = Programs(settings, facts, sections)
        self._barred: tuple[Spec, str] | None = None
        self._watching = Watching(library, facts)
        self._columns = Columns(settings.model, facts)

    def follow(self, settings: Settings) -> None:
        """Plan by these settings from now on; programs that are compiled stay."""
        self._settings = settings
        self.programs.follow(settings)

    def plan(self, steering: Steering, model_preset: str | None, arms: Arms | None = None) -> Plan:
        """The plan of a request.

        Args:
            arms: chooses the arms of roll-outs; without it no roll-out acts.

        Raises:
            TrimtabError: `path` is the place in the request, ("steering", "interventions", 1, "layers") for example.
        """
        policy_gate.check_asked(CURRENT.get().policies, steering)
        monitors = tuple(self._watching.monitor(watch, ("steering", "monitor", i))
                         for i, watch in enumerate(steering.monitor))
        graders = _graders(steering)
        disabled = self._kill_switch.reason
        system = self._system(None if disabled is not None else self.default_spec())
        if disabled is not None:
            if steering.required:
                raise SteeringDisabled(f"the kill switch is on ({disabled}), and the request is not to be served "
                                       "unsteered", param=("steering", "required"), fix="Leave required out, or wait.")
            # Monitors change nothing, so they are read even while steering is off.
            return Plan(None, disabled=disabled, report=steering.report, graders=graders, monitors=monitors,
                        system=system)
        if steering.default == "none" and model_preset is not None:
            raise InvalidSpec('default "none" means no steering at all, and the model name asks for a preset',
                              param=("steering", "default"), fix="Use the base model's name.")
        planned, presets, guards = self._collect(steering, model_preset, arms)
        # A beta of 0 leaves the strong run as it is.
        wanted = steering.contrast if steering.contrast is not None and steering.contrast.beta else None
        contrast = None if wanted is None else self._contrast(wanted, steering, guards)
        if planned:
            program, compiled = self._compiled(planned, arms)
            plan = Plan(program, compiled, presets=presets, report=steering.report, graders=graders, monitors=monitors,
                        guards=guards, required=steering.required, system=system, contrast=contrast)
        else:
            plan = Plan(None, presets=presets, report=steering.report, graders=graders, monitors=monitors,
                        system=system, contrast=contrast)
        if arms is not None and arms.taken:
            plan = replace(plan, arms=tuple(arms.taken.values()))
        if steering.required and not plan.steers:
            raise not_steered(("steering", "required"))
        return plan

    def weakened(self, plan: Plan, closed: Collection[int], factors: Sequence[float]) -> Program:
        """The plan's program for a prompt whose gates closed the interventions `closed`, each at a factor of its
        strength."""
        weaker = [replace(item, factor=item.factor * factor)
                  for item, factor in zip(plan.planned, factors, strict=True)]
        sections = None if plan.program is None else plan.program.sections
        return compile_program(weaker, self._facts).decided(closed).within(sections)

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
        """The plan of a spec that the request gives, by itself, kill switch or not. Refuses one that cannot be applied;
        the paths of errors begin at its `interventions`."""
        return self._alone(spec, _planned(spec.interventions, "request", "interventions"))

    def check_preset(self, preset: Preset) -> Plan:
        """The same of a stored spec, whose numbers are not the request's own. The errors' path is `preset`."""
        return self._alone(preset.spec, _of_preset(preset, "preset", ("preset",)))

    def mandatory(self) -> Plan:
        """What policies of who asks put in front of everything, by itself, kill switch or not."""
        given = _mandatory(CURRENT.get().policies)
        return Plan(*self._compiled(given)) if given else Plan(None)

    def _alone(self, spec: Spec, given: Sequence[Planned]) -> Plan:
        program, planned = self._compiled(given)
        guards = () if spec.guard is None else (self._watching.held(spec.guard, ("guard",)),)
        return Plan(program, planned, guards=guards)

    def _contrast(self, asked: Contrast, steering: Steering, guards: Sequence[HeldGuard]) -> PlannedContrast:
        """The weak run. What the server does of itself acts in it as in the strong one."""
        param = ("steering", "contrast")
        if guards:
            raise InvalidSpec("a guard measures one program against the untouched model, and a contrast has two",
                              param=param, fix="Leave the contrast out, or the guard with the spec that has it.")
        if steering.report != "none":
            raise InvalidSpec("effects are measured of one program against the untouched model, and a contrast has two",
                              param=("steering", "report"), fix="Leave the report out.")
        planned, _ = self._own(steering)
        weak, held = (*param, "weak"), CURRENT.get().policies
        if asked.weak.preset is not None:
            policy_gate.check_preset(held, asked.weak.preset, (*weak, "preset"))
            try:
                preset = self._library.presets.resolve(asked.weak.preset)
            except TrimtabError as error:
                raise error.about(*weak, "preset") from None
            policy_gate.check_preset(held, preset.ref, (*weak, "preset"))
            planned += _of_preset(preset, "preset", (*weak, "preset"))
        planned += _planned(asked.weak.interventions, "request", *weak, "interventions")
        if asked.weak.short is not None:
            planned.append(Planned(asked.weak.short, path=weak))
        return PlannedContrast(*self._compiled(planned), asked.alpha, asked.beta)

    def _own(self, steering: Steering) -> tuple[list[Planned], list[tuple[Guard | None, Path]]]:
        """What the server does of itself: mandatory specs of policies, and the default spec."""
        planned: list[Planned] = []
        guards: list[tuple[Guard | None, Path]] = []
        held = CURRENT.get().policies
        guards += [(one.policy.mandatory.guard, ("mandatory", "guard")) for one in held
                   if one.policy.mandatory is not None]
        planned += _mandatory(held)
        default = self.default_spec() if steering.default == "inherit" else None
        if default is not None:
            problem = self.default_spec_problem(default)
            if problem is not None:
                raise unusable_default(f"failed when it was tried: {problem}", ("default_spec",))
            guards.append((default.guard, ("default_spec", "guard")))
            planned += _planned(default.interventions, "default", "default_spec", "interventions")
        return planned, guards

    def _collect(self, steering: Steering, model_preset: str | None, arms: Arms | None) -> tuple[
            list[Planned], dict[str, str], tuple[HeldGuard, ...]]:
        planned, guards = self._own(steering)
        presets: dict[str, str] = {}
        held = CURRENT.get().policies
        named: tuple[tuple[Origin, str | None, Path], ...] = (
            ("model", model_preset, ("model",)), ("preset", steering.preset, ("steering", "preset")))
        for origin, ref, path in named:
            if ref is None:
                continue
            policy_gate.check_preset(held, ref, path)
            if arms is not None:
                ref = arms.ref("preset", ref, partial(policy_gate.allows_version, held, "preset"))
            try:
                preset = self._library.presets.resolve(ref)
            except TrimtabError as error:
                raise error.about(*path) from None
            policy_gate.check_preset(held, preset.ref, path)
            presets[origin] = preset.ref
            guards.append((preset.spec.guard, (*path, "guard")))
            planned += _of_preset(preset, origin, path)
        planned += _planned(steering.interventions, "request", "steering", "interventions")
        if steering.short is not None:
            planned.append(Planned(steering.short, path=("steering",)))
        guards.append((steering.guard, ("steering", "guard")))
        return planned, presets, tuple(self._watching.held(guard, path) for guard, path in guards if guard is not None)

    def _compiled(self, given: Sequence[Planned], arms: Arms | None = None) -> tuple[Program, tuple[Planned, ...]]:
        """The program of `given`, and `given` with its artifacts looked up, as the policies of who asks let it act."""
        held = CURRENT.get().policies
        given = [single for item in given for single in by_token(item)]
        policy_gate.check_names(held, given)
        for item in given:
            check_inline(item, self._settings.max_inline_bytes)
        planned = tuple(replace(item, source=self._source(item, arms), probes=self._probes(item, arms))
                        for item in given)
        planned = tuple(with_columns(with_rows(item, self._captured, self._facts, self._settings.max_inline_bytes),
                                     self._columns, self._facts) for item in planned)
        program = self.programs.compile(planned)
        return policy_gate.enforce(held, planned, program, self.programs.compile)[::-1] if held else (program, planned)

    def _system(self, default: Spec | None) -> str:
        """OpenAI's `system_fingerprint`: equal as long as the same request means the same to this server. It changes
        with the model's weights, with the default spec and with the artifacts that it names, whose aliases may move."""
        state = hashlib.sha256(self._facts.fingerprint.encode())
        if default is not None:
            planned = _planned(default.interventions, "default", "default_spec", "interventions")
            with suppress(TrimtabError):
                planned = [replace(item, source=self._source(item), probes=self._probes(item)) for item in planned]
            state.update(f"{key_of(planned)}|{default.guard}".encode())
        return f"fp_{state.hexdigest()[:16]}"

    def _source(self, item: Planned, arms: Arms | None = None) -> Source | None:
        if item.intervention.artifact is None:
            return None
        try:
            return self._library.source(_of_arm(item.intervention.artifact, arms))
        except TrimtabError as error:
            raise item.place(error, ("artifact",)) from None

    def _probes(self, item: Planned, arms: Arms | None = None) -> tuple[Source, ...]:
        gate = item.intervention.gate
        found = []
        for n, single in enumerate(gates_of(gate)):
            try:
                found.append(self._library.source(_of_arm(single.probe, arms)))
            except TrimtabError as error:
                member = (gate.members[0], n) if isinstance(gate, Gates) else ()
                raise item.place(error, ("gate", *member, "probe")) from None
        return tuple(found)


def _mandatory(held: Sequence[Held]) -> list[Planned]:
    return [item for one in held if one.policy.mandatory is not None
            for item in _planned(one.policy.mandatory.interventions, "policy", "mandatory", "interventions")]


def _graders(steering: Steering) -> tuple[Grader, ...]:
    if steering.report != "outcome":
        return ()
    try:
        return text_graders(steering.graders or ["refusal"])
    except InvalidSpec as error:
        raise error.at("steering", "graders") from None


def not_steered(param: Path) -> NotSteered:
    return NotSteered("nothing would be applied to this request, and it is not to be served unsteered", param=param,
                      fix="Give interventions or a preset whose strength is not zero in `steering`; a gateway in "
                      "between may have dropped the field.")


def _planned(interventions: Sequence[Intervention], origin: Origin, *path: str) -> list[Planned]:
    """Interventions of a list that stands at `path` in the request."""
    return [Planned(item, origin=origin, path=(*path, i)) for i, item in enumerate(interventions)]


def _of_preset(preset: Preset, origin: Origin, path: Path) -> list[Planned]:
    """Interventions of a stored spec that the field at `path` of the request names."""
    return [Planned(item, origin=origin, path=path, preset=preset.ref) for item in preset.spec.interventions]


def _of_arm(ref: str, arms: Arms | None) -> str:
    """The version of an artifact that the request's arm has."""
    if arms is None:
        return ref
    return arms.ref("artifact", ref, partial(policy_gate.allows_version, CURRENT.get().policies, "artifact"))
