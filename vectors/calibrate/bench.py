"""What a calibration asks of a model: completions under a program, each measured against the untouched model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vectors.extract.subject import Programs, Prompt, Subject, Tokens


@dataclass(frozen=True)
class Trial:
    """One completion.

    kl: mean KL(steered || untouched) over its tokens, nats. surprise: mean -log p of its tokens under the untouched
    model. repetition, compression: signs of degeneration. length: tokens. ended: by the model itself.
    """

    kl: float
    surprise: float
    repetition: float
    compression: float
    length: int
    ended: bool
    text: str


class Bench(Subject, Protocol):
    def trials(self, prompts: Sequence[Tokens], program: Programs, max_tokens: int, temperature: float,
               seed: int | Sequence[int], roles: Sequence[Sequence[str] | None] | None = None) -> list[Trial]:
        """One completion of each prompt, all in one batch as far as the model has room for it.

        program: one for all of them, or one each. seed: completion i is drawn with seed + i, or with its own, whatever
        the program. roles: of the tokens of each prompt, for programs whose scopes name roles. Gates are decided for
        each prompt."""
        ...

    def roles(self, prompt: Prompt) -> list[str] | None:
        """One role per token of an encoded conversation; None for other prompts."""
        ...
