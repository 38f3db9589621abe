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
    rounds: strengths that each place is tried at, each chosen by what the one before did. draws: random vectors.
    tokens: written a question.
    """

    layers: int
    places: int
    pairs: int
    scout: int
    prompts: int
    rounds: int
    draws: int
    tokens: int

    @property
    def completions(self) -> int:
        """Untouched, asked for in words, scouted, beside the best place, at the refined strengths, random."""
        scouted = self.places * self.rounds + BESIDE
        return (2 + REFINED) * self.prompts + (scouted + self.draws) * self.scout

    def work(self, prompt: int, answer: int) -> int:
        """Tokens that go through the model, for prompts and answers of these lengths; a bound, as texts end early."""
        scored = self.pairs * (prompt + min(answer, SCORED_TOKENS)) * (self.layers + 5)
        return scored + self.completions * (prompt + 2 * self.tokens)


# Places beside the best one; what answers all questions, the two best places and strengths around the best one and
# beyond; tokens of a continuation that are scored.
BESIDE, REFINED, SCORED_TOKENS = 4, 7, 12

BUDGETS: dict[Effort, Budget] = {
    "quick": Budget(layers=8, places=3, pairs=3, scout=4, prompts=8, rounds=2, draws=5, tokens=20),
    "normal": Budget(layers=14, places=4, pairs=6, scout=8, prompts=12, rounds=3, draws=20, tokens=24),
    "thorough": Budget(layers=24, places=6, pairs=12, scout=12, prompts=24, rounds=4, draws=20, tokens=32),
}


def seconds(tokens: int, subject: Subject, sample: Sequence[int]) -> float:
    """How long so many tokens will take, from the speed of one small pass. That ran beside whatever else the server did
    at that moment, and so will the work."""
    began = time.monotonic()
    layer = min(subject.facts.sites[SITE])
    subject.capture([sample], SITE, [layer], [-1])
    return float(f"{tokens * max(time.monotonic() - began, 1e-4) / len(sample):.2g}")
