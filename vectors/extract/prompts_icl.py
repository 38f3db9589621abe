"""In-context prompts of a task that is given as word pairs: demonstrations, then a query (Todd et al. 2024, arXiv
2310.15213).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, StringConstraints

from steering.language.fields import Model
from vectors.extract.contract import Split
from vectors.extract.items import Splits, digest_of, split_items
from vectors.extract.refusals import EmptyText, LeakingSplit, NoContrast, TooFewExamples
from vectors.extract.subject import Subject, Tokens, encoded, first_token

Word = Annotated[str, StringConstraints(max_length=4096)]
# Templates hold exactly one slot.
Template = Annotated[str, StringConstraints(pattern=r"^[^{}]*\{x\}[^{}]*$", max_length=1024)]


class TaskPair(Model):
    """Input and output of a task."""

    input: Word = Field(description="What is asked about.")
    output: Word = Field(description="The answer; a space is put before it unless it begins with one.")
    split: Split | None = Field(default=None, description="Fixed split; give it for all pairs or for none.")


@dataclass(frozen=True)
class Task:
    """Pairs of one task, their first answer tokens and splits. Pairs of one input stay in one split."""

    subject: Subject
    template: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    answers: tuple[int, ...]
    splits: Splits
    digest: str

    def zero_shot(self, query: int) -> Tokens:
        return encoded(self.subject, self.template.replace("{x}", self.inputs[query]), ("pairs", query, "input"))

    def few_shot(self, query: int, shots: int, chance: random.Random, *, shuffled: bool = False) -> Tokens:
        """Demonstrations come from the train split and never show the query's input.

        shuffled: each demonstration is given the output of another train pair.
        """
        pool = [n for n in self.splits["train"] if self.inputs[n] != self.inputs[query]]
        shown = chance.sample(pool, min(shots, len(pool)))
        said = [self.outputs[n] for n in shown]
        if shuffled:
            said = [self.outputs[n] for n in chance.sample(pool, len(shown))]
        lines = [self.template.replace("{x}", self.inputs[n]) + output for n, output in zip(shown, said, strict=True)]
        return encoded(self.subject, "\n".join([*lines, self.template.replace("{x}", self.inputs[query])]),
                       ("pairs", query, "input"))


def make_task(pairs: Sequence[TaskPair], template: str, shots: int, subject: Subject, seed: int, *,
              param: str = "pairs", single_token: bool = False) -> Task:
    """Check the pairs and split them by input.

    single_token: leave out pairs whose answer is more than one token.

    Raises:
        InvalidData: one of its kinds, naming the pair as `pairs[i]`.
    """
    for n, pair in enumerate(pairs):
        for side in ("input", "output"):
            if not getattr(pair, side).strip():
                raise EmptyText(f"the {side} is empty", param=(param, n, side))
    seen: dict[tuple[str, str], int] = {}
    for n, pair in enumerate(pairs):
        first = seen.setdefault((pair.input.strip(), pair.output.strip()), n)
        if first != n and pairs[first].split != pair.split:
            raise LeakingSplit(f"the pair repeats {param}[{first}], in another split", param=(param, n),
                               fix="Leave it out.")
    numbers = [n for n, pair in enumerate(pairs)
               if not single_token or len(subject.encode_continuation(_spaced(pair.output))) == 1]
    if not numbers:
        raise TooFewExamples("no answer is a single token to this model", param=param)
    kept = [pairs[n] for n in numbers]
    if len({pair.output.strip() for pair in kept}) < 2:
        raise NoContrast("every pair has the same output", param=param, fix="Give a task whose answers differ.")
    inputs = tuple(pair.input.strip() for pair in kept)
    outputs = tuple(_spaced(pair.output) for pair in kept)
    splits = split_items(inputs, [pair.split for pair in kept], seed, param)
    answers = tuple(first_token(subject, output, (param, n, "output"))
                    for n, output in zip(numbers, outputs, strict=True))
    _check_answers(outputs, answers, param)
    task = Task(subject, template, inputs, outputs, answers, splits,
                digest_of([inputs, outputs, template, {s: list(m) for s, m in splits.items()}]))
    for n in range(len(inputs)):
        task.zero_shot(n)
    if len({inputs[n] for n in splits["train"]}) <= shots:
        raise TooFewExamples(f"{shots} demonstrations beside a query need more than {shots} train pairs",
                             param=param, fix="Give more pairs, or fewer shots.")
    return task


def _spaced(output: str) -> str:
    return output if output[0].isspace() else f" {output}"


def _check_answers(outputs: Sequence[str], answers: Sequence[int], param: str) -> None:
    """Answers are scored by their first token: one that most of them share would make any answer right.

    Raises:
        NoContrast
    """
    of_token: dict[int, set[str]] = {}
    for output, token in zip(outputs, answers, strict=True):
        of_token.setdefault(token, set()).add(output.strip())
    most = max(of_token.values(), key=len)
    if 2 * len(most) > len(set(map(str.strip, outputs))) and len(most) > 1:
        raise NoContrast(f"{len(most)} of {len(set(outputs))} different answers begin with the same token, so their "
                         "first tokens do not tell them apart: this model has no tokens of their own for them",
                         param=param, fix="Use a model that knows these words, or set single_token to leave out what "
                                          "it spells in pieces.")
