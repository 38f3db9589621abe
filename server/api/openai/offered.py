"""Which presets are offered as model names: those that were made for the model that is served."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from steering.artifacts.source import Resolved
from steering.language.errors import TrimtabError
from steering.language.spec import Spec
from steering.models.facts import ModelFacts
from steering.programs.compiler import compile_program
from steering.programs.gate import gates_of
from vectors.library import Library, MadeFor
from vectors.library.presets import Preset


@dataclass(frozen=True)
class Offer:
    """Answers from what the library records about artifacts: reading their numbers for a list would cost too much."""

    library: Library
    facts: ModelFacts

    def fitting(self, presets: Sequence[Preset]) -> list[Preset]:
        """Those whose artifacts are there, were made on this model or do not say on which, and have its width."""
        made_for = self.library.sources.made_for(ref for preset in presets for ref, _ in _uses(preset.spec))
        return [preset for preset in presets if self._fits(preset, made_for)]

    def _fits(self, preset: Preset, made_for: Mapping[str, MadeFor]) -> bool:
        if not all(ref in made_for and self._same(made_for[ref], any_model) for ref, any_model in _uses(preset.spec)):
            return False
        return all(self._compiles(Resolved(item)) for item in preset.spec.interventions if item.inline is not None)

    def _same(self, made: MadeFor, any_model: bool) -> bool:
        if not any_model and made.fingerprint not in (None, self.facts.fingerprint):
            return False
        return made.d_model in (None, self.facts.d_model)

    def _compiles(self, resolved: Resolved) -> bool:
        try:
            compile_program([resolved], self.facts)
        except TrimtabError:
            return False
        return True


def _uses(spec: Spec) -> Iterator[tuple[str, bool]]:
    """Artifacts that a spec names, each with whether it may be another model's."""
    for item in spec.interventions:
        if item.artifact is not None:
            yield item.artifact, "model" in item.override
        for gate in gates_of(item.gate):
            yield gate.probe, "model" in gate.override
