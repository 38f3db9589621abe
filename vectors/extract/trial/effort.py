"""How much a trial may spend, and how long that will take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from steering.language.vocabulary import Site
from vectors.extract.subject import Subject

SITE: Site = "resid_post"
Effort = Literal["none", "quick", "normal", "thorough"]


@dataclass(frozen=True)
class Budget:
    """layers: looked at by their first-order effect, evenly over the middle of the depth. places: tried by writing.
    pairs: whose continuations are scored. scout, prompts: questions a candidate, and the chosen one, is tried on.
    strengths: on the scale of each place. draws: random vectors. tokens: written a question.
    """

    layers: int
    places: int
    pairs: int
    scout: int
    prompts: int
    strengths: int
    draws: int
    tokens: int

    @property
    def completions(self) -> int:
        """Untouched, scouted, at the refined strengths, random."""
        return (self.prompts + self.places * self.strengths * self.scout + REFINED * self.prompts
                + self.draws * self.scout)

    def work(self, prompt: int, answer: int) -> int:
        """Tokens that go through the model, for prompts and answers of these lengths; a bound, as texts end early."""
        scored = 2 * self.pairs * (prompt + min(answer, SCORED_TOKENS)) * (self.layers + 4)
        return scored + self.completions * (prompt + 2 * self.tokens)


# Strengths around the best one, on all questions; tokens of a continuation whose log-odds are taken.
REFINED, SCORED_TOKENS = 5, 16

BUDGETS: dict[Effort, Budget] = {
    "quick": Budget(layers=6, places=2, pairs=4, scout=4, prompts=8, strengths=4, draws=5, tokens=20),
    "normal": Budget(layers=10, places=4, pairs=8, scout=8, prompts=12, strengths=5, draws=20, tokens=24),
    "thorough": Budget(layers=16, places=6, pairs=16, scout=12, prompts=24, strengths=6, draws=20, tokens=32),
}


def seconds(tokens: int, subject: Subject, sample: Sequence[int]) -> float:
    """How long so many tokens will take, from the speed of one small pass. That ran beside whatever else the server did
    at that moment, and so will the work."""
    began = time.monotonic()
    layer = min(subject.facts.sites[SITE])
    subject.capture([sample], SITE, [layer], [-1])
    return float(f"{tokens * max(time.monotonic() - began, 1e-4) / len(sample):.2g}")
