"""What one request applies, and where in the request each part of it came from, so that errors name that place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from server.errors import DefaultSpecUnusable
from server.requests.guard import HeldGuard
from server.requests.monitor import Monitor
from server.rollouts.arms import Arm
from steering.artifacts.source import Resolved
from steering.language.errors import Path, TrimtabError, path_text
from steering.language.intervention import Intervention
from steering.language.scope import PromptSelection, Scope
from steering.language.spec import Report
from steering.programs.program import Program
from steering.programs.sections import Sections
from steering.programs.touch import Touch
from vectors.evaluate.graders.contract import Grader
from vectors.storage_errors import LibraryUnavailable, StorageUnavailable

Origin = Literal["policy", "default", "model", "preset", "request"]


@dataclass(frozen=True)
class Planned(Resolved):
    """One intervention with its artifacts looked up, and where it came from.

    path: its place in the request, or the field that named the preset it is of. preset: that preset with its version.
    lowered: why its strength is not the one that was asked for.
    """

    origin: Origin = "request"
    path: Path = ()
    preset: str | None = None
    lowered: str | None = None

    def place(self, error: TrimtabError, field: Path) -> TrimtabError:
        """The error about a field of this intervention, with the place in the request that it came from."""
        if isinstance(error, LibraryUnavailable | StorageUnavailable):
            # It says nothing of the intervention, and may be over soon.
            return error
        if self.origin == "default":
            return unusable_default(f"cannot be applied: {error.message}", (*self.path, *field))
        if self.origin == "policy":
            return unusable_mandatory(f"cannot be applied: {error.message}", (*self.path, *field))
        if self.preset is not None:
            # The fault lies in the preset; the request only named it.
            where = f"{path_text(field)}: " if field else ""
            error.message = f"preset {self.preset}: {where}{error.message}"
            return error.about(*self.path)
        return error.about(*self.path, *field)


@dataclass(frozen=True)
class PlannedContrast:
    """The weak run of a request: its program, what that was compiled from, and how far it is contrasted."""

    program: Program
    planned: tuple[Planned, ...]
    alpha: float
    beta: float


@dataclass(frozen=True)
class Plan:
    """What one request applies.

    Attributes:
        program: None where nothing is applied.
        planned: what the program was compiled from, one entry per intervention.
        disabled: why the kill switch held the steering back, else None.
        presets: resolved presets by what named them ("model", "preset").
        graders: of the answers, where the report is one of outcomes.
        monitors: what to read of the finished completion.
        guards: limits, all of which hold.
        required: the request is not to be served unsteered.
        system: fingerprint of what the server does of itself, model and default spec.
        arms: of roll-outs, that the request belongs to.
        contrast: the weak run, where tokens are chosen by the difference between two.
    """

    program: Program | None
    planned: tuple[Planned, ...] = ()
    disabled: str | None = None
    presets: Mapping[str, str] | None = None
    report: Report = "none"
    graders: tuple[Grader, ...] = ()
    monitors: tuple[Monitor, ...] = ()
    guards: tuple[HeldGuard, ...] = ()
    required: bool = False
    system: str = ""
    arms: tuple[Arm, ...] = ()
    contrast: PlannedContrast | None = None

    @property
    def steers(self) -> bool:
        """Whether something would be applied, its gates permitting."""
        return any(item.rows for _, program in self._runs for item in program.compiled)

    @property
    def names_roles(self) -> bool:
        return any(_names_roles(item.intervention.scope) for planned, _ in self._runs for item in planned)

    @property
    def _runs(self) -> list[tuple[tuple[Planned, ...], Program]]:
        """The programs, each with what it was compiled from."""
        own = [] if self.program is None else [(self.planned, self.program)]
        return own if self.contrast is None else [*own, (self.contrast.planned, self.contrast.program)]

    def within(self, sections: Sections) -> "Plan":
        """The plan for completions whose sections are told so."""
        weak = self.contrast
        return replace(self, program=None if self.program is None else self.program.within(sections),
                       contrast=None if weak is None else replace(weak, program=weak.program.within(sections)))

    def check_prompt(self, prompt_ids: Sequence[int], roles: Sequence[str] | None) -> None:
        """Refuse scopes that do not fit the prompt. Raises InvalidSpec."""
        for planned, program in self._runs:
            try:
                Touch.of(program.scopes, prompt_ids, 0, roles, sections=program.sections)
            except TrimtabError as error:
                raise localised(error, planned) from None

    def placed(self, error: TrimtabError) -> TrimtabError:
        """What an engine says of an intervention of the program, in the words of the request; other errors as they
        are."""
        if self.contrast is not None and error.path[:2] == ("contrast", "weak"):
            return localised(error.about(*error.path[2:]), self.contrast.planned)
        return error if _intervention(error) is None else localised(error, self.planned)


def own_numbers(intervention: Intervention) -> list[Path]:
    """The fields in which an intervention gives numbers that are not of the library."""
    fields: dict[Path, object] = {("inline",): intervention.inline, ("options", "source"): intervention.captured}
    return [field for field, given in fields.items() if given is not None]


def localised(error: TrimtabError, planned: Sequence[Planned]) -> TrimtabError:
    """The error with the place in the request from which intervention i came, where the compiler says
    `("interventions", i)`."""
    index = _intervention(error)
    return error.at("steering") if index is None else planned[index].place(error, error.path[2:])


def _intervention(error: TrimtabError) -> int | None:
    """Which intervention of the program an error is about; None where it is about something else."""
    match error.path:
        case ("interventions", int(index), *_):
            return index
    return None


def unusable_default(what: str, param: Path) -> DefaultSpecUnusable:
    return DefaultSpecUnusable(f"the server's default spec {what}", param=param,
                               fix='Change it at /v1/admin/default-spec, or send "default": "none" or "override".')


def unusable_mandatory(what: str, param: Path) -> DefaultSpecUnusable:
    return DefaultSpecUnusable(f"the mandatory spec of a policy that holds for this key {what}", param=param,
                               fix="Have an administrator change it at /v1/admin/policies.")


def _names_roles(scope: Scope) -> bool:
    prompt = scope.prompt
    return isinstance(prompt, PromptSelection) and bool(
        prompt.roles or (prompt.exclude is not None and prompt.exclude.roles))
