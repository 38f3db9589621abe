"""What the hour measured, and what is demanded of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vectors.evaluate.graders.contract import Answer
from vectors.evaluate.graders.grade import grade
from vectors.evaluate.graders.language import LanguageGrader

# Share of positive answers over untouched and over every random vector; broken ones over untouched.
GAINED, MORE_BROKEN = 0.30, 0.05
# Of the share that the instruction reaches.
OF_THE_CEILING = 0.6


@dataclass
class Figures:
    """Shares of the answers. random: of each vector. french, instructed: whole French texts under the vector, and where
    the prompt asks for French, by the rules that look at the text alone: a model of English finds any French unlikely.
    french_by_surprise: as the evaluation counts it, which does not know that. unchanged: names whose text was that of
    the untouched model, or of a preset, another than its artifact's."""

    untouched: float
    steered: float
    random: list[float]
    broken_untouched: float
    broken_steered: float
    french: float
    instructed: float
    french_by_surprise: float
    texts: list[dict[str, Any]] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    seconds: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def of_language(texts: Sequence[str], language: str) -> float:
    """Share of texts that are whole and in a language."""
    verdicts = grade(LanguageGrader(language=language), [Answer(text) for text in texts])
    return sum(verdict.success for verdict in verdicts) / len(verdicts)


def unmet(found: Figures) -> list[str]:
    """A sentence for each demand that is not met."""
    said = [f"{name} does not do what it should" for name in found.unchanged]
    if found.steered < found.untouched + GAINED:
        said.append(f"positive answers: {found.steered:.0%}, untouched {found.untouched:.0%}")
    if found.random and found.steered < max(found.random) + GAINED:
        said.append(f"positive answers: {found.steered:.0%}, under the best random vector {max(found.random):.0%}")
    if found.broken_steered > found.broken_untouched + MORE_BROKEN:
        said.append(f"broken answers: {found.broken_steered:.0%}, untouched {found.broken_untouched:.0%}")
    if found.french < OF_THE_CEILING * found.instructed:
        said.append(f"French answers: {found.french:.0%}, where the prompt asks for them {found.instructed:.0%}")
    if found.instructed == 0:
        said.append("the model answers in French to no prompt that asks for it")
    return said
