"""What a model would say next, as one number: the log-odds of a group of first tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from steering.language.fields import Model
from steering.programs.program import Program
from vectors.extract.refusals import NoContrast
from vectors.extract.subject import Subject, answer_logprobs, first_token

Answers = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(min_length=1, max_length=256)]


class ReadoutOptions(Model):
    """Answers that count as the behaviour, by their first token, spelled as they follow the prompt."""

    target: Answers = Field(description="Answers of the behaviour.")
    others: Annotated[list[str], Field(max_length=256)] = Field(
        default=[], description="Answers it is weighed against; empty: every other token.")


@dataclass(frozen=True)
class Readout:
    """target, others: first tokens; no others: all the rest of the vocabulary."""

    subject: Subject
    target: tuple[int, ...]
    others: tuple[int, ...]

    def log_odds(self, texts: Sequence[Sequence[int]], span: Callable[[float], None], program: Program | None = None
                 ) -> torch.Tensor:
        """log p(target) - log p(others) after each text, `[num_texts]` float64."""
        logprobs = answer_logprobs(self.subject, texts, span, program,
                                   tokens=[*self.target, *self.others] if self.others else self.target)
        target = logprobs[:, :len(self.target)].logsumexp(dim=1)
        if self.others:
            return target - logprobs[:, len(self.target):].logsumexp(dim=1)
        # Rounding may put the sum of all tokens' probabilities a little over 1.
        rest = (1 - target.exp()).clamp_min(torch.finfo(torch.float32).eps)
        return target - rest.log()


def make_readout(options: ReadoutOptions, subject: Subject) -> Readout:
    """Raises NoContrast: an answer of one group begins like one of the other; EmptyText."""
    target = tuple(dict.fromkeys(first_token(subject, text, ("readout", "target", n))
                                 for n, text in enumerate(options.target)))
    others = tuple(dict.fromkeys(first_token(subject, text, ("readout", "others", n))
                                 for n, text in enumerate(options.others)))
    shared = set(target) & set(others)
    if shared:
        raise NoContrast("an answer of target and one of others begin with the same token", param=("readout", "others"),
                         fix="Use answers whose first tokens differ.")
    return Readout(subject, target, others)
