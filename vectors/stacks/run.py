"""The check: each intervention alone, pairs that do not simply add up, the stack, and the stack in better orders.

Let z be the untouched log-probabilities, d_i what intervention i alone changes in them, and c_ij what i and j together
change beyond d_i + d_j. The stack is predicted to be the softmax of z + sum d_i + sum c_ij, with c_ij measured for
pairs that meet and taken as 0 for all others. For small changes KL is half of the variance of the change under the
untouched model, that is half of its square in the Fisher metric of the output; so what two interventions have beyond
the sum of their own is the covariance of d_i and d_j, which is told as their correlation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from steering.language.errors import InvalidRequest
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.program import Compiled, Program
from vectors.extract.subject import Tokens, Written
from vectors.stacks.meetings import Seen, disturbs, meetings, places
from vectors.stacks.report import Advice, Meeting, Pair, Part, StackCheck, advised

# Share done and stage; it raises when the work is cancelled.
Progress = Callable[[float, str], None]
MOST_PAIRS, MOST_ORDERS = 16, 4
# Tokens whose activations are looked at.
MOST_ROWS = 1024
PROMPTS = (
    "The weather in the mountains was", "When she opened the letter,", "Most people agree that the best way to",
    "In the morning the market", "He asked his neighbour whether", "The history of the town begins",
    "To repair a bicycle you first", "After the meeting they decided", "The recipe needs two",
    "Scientists have found that", "My brother told me about", "On the way home the bus",
    "The film was", "Every winter the lake", "If you want to learn a language,", "The price of bread",
)


class Model(Protocol):
    """What the check asks of a model; see `vectors.extract.subject.Subject`."""

    @property
    def facts(self) -> ModelFacts: ...

    def capture(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                positions: Sequence[int] | None, program: Program | None = None) -> list[Mapping[int, Tensor]]: ...

    def write(self, texts: Sequence[Sequence[int]], max_tokens: int) -> list[Written]: ...

    def continuation_rows(self, text: Sequence[int], start: int, program: Program | None = None,
                          roles: Sequence[str] | None = None) -> Tensor:
        """Log-probabilities of the vocabulary for each token from `start` on, `[len(text) - start, vocab_size]`; those
        tokens count as generated."""
        ...


@dataclass(frozen=True)
class Text:
    """A prompt, and a role for each token of it where scopes name roles."""

    prompt: Tokens
    roles: Sequence[str] | None = None


def check(program: Program, parts: Sequence[Part], prompts: Sequence[Text], max_tokens: int, model: Model,
          progress: Progress = lambda share, stage: None, *, most_pairs: int = MOST_PAIRS) -> StackCheck:
    """
    Args:
        program: the stack. Its gates count as open. parts: what is told of each intervention; `kl` is filled in.
        max_tokens: of the continuation that the untouched model writes to each prompt. most_pairs: that are run.

    Raises:
        InvalidRequest: fewer than two interventions act.
        TrimtabError: as the model.
    """
    stack = program.decided(())
    acting = [n for n, item in enumerate(stack.compiled) if item.rows]
    if len(acting) < 2:
        raise InvalidRequest(f"{len(acting)} of the interventions act; a stack has at least two",
                             param=("steering", "interventions"), fix="Give two or more with a strength other than 0.")
    progress(0.0, "write")
    said = model.write([one.prompt for one in prompts], max_tokens)
    written = [_Continued(prompt, one.ids) for prompt, one in zip(prompts, said, strict=True) if one.ids]
    if not written:
        raise InvalidRequest("the model ends every one of these prompts at once", param="prompts",
                             fix="Give prompts that it goes on with.")
    progress(0.05, "read")
    met = _met(stack.compiled, acting, written, stack, model)
    run = [pair for pair, (_, found) in met.items() if any(map(disturbs, found))][:most_pairs]
    sums = _Sums(acting, run)
    for n, text in enumerate(written):
        progress(0.1 + 0.7 * n / len(written), "measure")
        sums.add(text, stack, model)
    filled = [part.model_copy(update={"kl": sums.alone(n)}) for n, part in enumerate(parts)]
    pairs = [_pair(pair, *met[pair], sums) for pair in met]
    advice = _reordered(advised(filled, pairs), stack, written, model, progress)
    total = sum(part.kl for part in filled)
    return StackCheck(
        interventions=filled, pairs=pairs, sum_of_parts=total, predicted=sums.predicted, measured=sums.measured,
        interference=sums.predicted - total, measured_interference=sums.measured - total, advice=advice,
        texts=len(written), tokens=sums.tokens)


@dataclass(frozen=True)
class _Continued:
    text: Text
    said: Tokens

    @property
    def ids(self) -> Tokens:
        return (*self.text.prompt, *self.said)

    def rows(self, model: Model, program: Program | None) -> Tensor:
        return model.continuation_rows(self.ids, len(self.text.prompt), program, self.text.roles).float()


def divergence(steered: Tensor, untouched: Tensor) -> Tensor:
    """KL(steered || untouched) `[tokens]` of log-probabilities `[tokens, vocab_size]`."""
    mass = steered.exp()
    return torch.where(mass > 0, mass * (steered - untouched), 0.0).sum(-1)


class _Sums:
    """What is summed over texts; at no time are the log-probabilities of more than one text held."""

    def __init__(self, acting: Sequence[int], run: Sequence[tuple[int, int]]) -> None:
        self._acting, self._run = list(acting), list(run)
        self.tokens = 0
        self._alone = dict.fromkeys(acting, 0.0)
        self._both = {(a, b): 0.0 for n, a in enumerate(acting) for b in acting[n + 1:]}
        self._gram = torch.zeros(len(acting), len(acting), dtype=torch.float64)
        self._predicted = self._measured = 0.0

    def add(self, text: _Continued, stack: Program, model: Model) -> None:
        base = text.rows(model, None)
        # Log-probabilities of -inf say nothing of changes; no model of finite logits gives them.
        changes = {n: text.rows(model, only(stack, [n])) - base for n in self._acting}
        mass, total = base.exp(), base + sum(changes.values())
        for n, change in changes.items():
            self._alone[n] += float(divergence(base + change, base).sum())
        centred = {n: change - (mass * change).sum(-1, keepdim=True) for n, change in changes.items()}
        for i, a in enumerate(self._acting):
            for j, b in enumerate(self._acting[:i + 1]):
                product = float((mass * centred[a] * centred[b]).sum())
                self._gram[i, j] += product
                self._gram[j, i] = self._gram[i, j]
        for a, b in self._both:
            both = base + changes[a] + changes[b]
            if (a, b) in self._run:
                measured = text.rows(model, only(stack, [a, b]))
                total += measured - both
                both = measured
            self._both[a, b] += float(divergence(both.log_softmax(-1), base).sum())
        self._predicted += float(divergence(total.log_softmax(-1), base).sum())
        self._measured += float(divergence(text.rows(model, stack), base).sum())
        self.tokens += len(base)

    def alone(self, n: int) -> float:
        return self._alone.get(n, 0.0) / self.tokens

    def both(self, pair: tuple[int, int]) -> float:
        return self._both[pair] / self.tokens

    def correlation(self, pair: tuple[int, int]) -> float:
        i, j = (self._acting.index(n) for n in pair)
        size = float((self._gram[i, i] * self._gram[j, j]).sqrt())
        return float(self._gram[i, j]) / size if size else 0.0

    def ran(self, pair: tuple[int, int]) -> bool:
        return pair in self._run

    @property
    def predicted(self) -> float:
        return self._predicted / self.tokens

    @property
    def measured(self) -> float:
        return self._measured / self.tokens


def only(stack: Program, members: Sequence[int]) -> Program:
    """Some of the interventions, in the order given."""
    return replace(stack, compiled=tuple(stack.compiled[n] for n in members))


def _met(compiled: Sequence[Compiled], acting: Sequence[int], written: Sequence[_Continued], stack: Program,
         model: Model) -> dict[tuple[int, int], tuple[list[tuple[int, int]], list[Meeting]]]:
    """By pair, where they meet."""
    seen = _seen(compiled, written, stack, model)
    return {(a, b): meetings(a, b, compiled, seen, model.facts)
            for n, a in enumerate(acting) for b in acting[n + 1:]}


def _seen(compiled: Sequence[Compiled], written: Sequence[_Continued], stack: Program, model: Model) -> Seen:
    chosen: list[_Continued] = []
    for one in written:
        if chosen and sum(len(other.ids) for other in chosen) + len(one.ids) > MOST_ROWS:
            break
        chosen.append(one)
    activations = {}
    for site, layers in places(compiled).items():
        found = model.capture([one.ids for one in chosen], site, layers, None)
        for layer in layers:
            activations[site, layer] = torch.cat([one[layer].float() for one in found])
    bits = torch.cat([torch.from_numpy(stack.touch(one.text.prompt, len(one.said), one.text.roles).bits_of(one.ids)
                                       .astype("int64")) for one in chosen])
    return Seen(activations, torch.stack([(bits >> n & 1).bool() for n in range(len(compiled))]))


def _pair(pair: tuple[int, int], order: Sequence[tuple[int, int]], found: Sequence[Meeting], sums: _Sums) -> Pair:
    first, second = order[0] if order else pair
    return Pair(first=first, second=second, interference=sums.both(pair) - sums.alone(first) - sums.alone(second),
                correlation=sums.correlation(pair), measured=sums.ran(pair),
                # Of one pair, all are told in the order of the most telling one.
                meetings=[one for who, one in zip(order, found, strict=True) if who == (first, second)])


def _reordered(advice: list[Advice], stack: Program, written: Sequence[_Continued], model: Model, progress: Progress
               ) -> list[Advice]:
    """What the stack does in the orders that are advised."""
    told, tried = [], 0
    for one in advice:
        if one.do == "reorder" and tried < MOST_ORDERS:
            progress(0.8 + 0.2 * tried / MOST_ORDERS, "reorder")
            tried += 1
            moved, behind = one.interventions
            order = [n for n in range(len(stack.compiled)) if n != moved]
            order.insert(order.index(behind) + 1, moved)
            program, total, tokens = only(stack, order), 0.0, 0
            for text in written:
                kl = divergence(text.rows(model, program), text.rows(model, None))
                total, tokens = total + float(kl.sum()), tokens + len(kl)
            one = one.model_copy(update={"kl": total / tokens})
        told.append(one)
    return told
