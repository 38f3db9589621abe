"""The classic function vector: averaged outputs of the heads that cause the answer (Todd et al. 2024, arXiv
2310.15213)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steering.language.errors import UnsupportedModel
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from vectors.extract.programs import program_of
from vectors.extract.prompts_icl import Task
from vectors.extract.subject import answer_logprobs, stream
from vectors.extract.work import Span

LINEAR_TOLERANCE = 1e-3


@dataclass(frozen=True)
class HeadAverage:
    """means: layer -> mean `head_out` at the last token, `[num_heads * head_dim]` float64.
    effects: (layer, head) -> rise of p(answer) when the head's output is put in its place.
    """

    means: dict[int, torch.Tensor]
    effects: dict[tuple[int, int], float]

    def top(self, count: int) -> list[tuple[int, int]]:
        return sorted(self.effects, key=lambda key: (-self.effects[key], key))[:count]


def mean_heads(task: Task, layers: Sequence[int], shots: int, num_prompts: int, chance: random.Random, span: Span, *,
               shuffled: bool = False) -> dict[int, torch.Tensor]:
    """Mean `head_out` at the last token of few-shot prompts."""
    queries = [chance.choice(task.splits["train"]) for _ in range(num_prompts)]
    prompts = [task.few_shot(query, shots, chance, shuffled=shuffled) for query in queries]
    sums = {layer: torch.zeros(task.subject.facts.width("head_out"), dtype=torch.float64) for layer in layers}
    for _, found in stream(task.subject, prompts, "head_out", layers, [-1], span):
        for layer in layers:
            sums[layer] += found[layer][0].double()
    return {layer: total / num_prompts for layer, total in sums.items()}


def causal_heads(task: Task, layers: Sequence[int], shots: int, num_prompts: int, num_shuffled: int,
                 chance: random.Random, span: Span) -> HeadAverage:
    """Mean outputs, and each head's indirect effect: p(answer) on prompts with shuffled demonstrations with the head's
    mean in its place, less p(answer) without."""
    facts = task.subject.facts
    means = mean_heads(task, layers, shots, num_prompts, chance, span.part(0, 4))
    queries = [chance.choice(task.splits["train"]) for _ in range(num_shuffled)]
    prompts = [task.few_shot(query, shots, chance, shuffled=True) for query in queries]
    answers = torch.tensor([task.answers[query] for query in queries])

    def p_answer(program: Program | None, part: Span) -> torch.Tensor:
        logprobs = answer_logprobs(task.subject, prompts, part, program)
        return logprobs.gather(1, answers.unsqueeze(1)).squeeze(1).exp()

    keys = [(layer, head) for layer in layers for head in range(facts.num_heads)]
    rest = Span(span.work, span.start + (span.stop - span.start) / 4, span.stop, span.stage)
    clean = p_answer(None, rest.part(0, len(keys) + 1))
    effects = {}
    for done, (layer, head) in enumerate(keys):
        changed = p_answer(_head_put(facts, layer, head, means[layer]), rest.part(done + 1, len(keys) + 1))
        effects[layer, head] = float((changed - clean).mean())
    return HeadAverage(means, effects)


def summed(task: Task, means: dict[int, torch.Tensor], heads: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Sum over heads of W_O[:, h] a[l, h], `[d]` float64.

    The projection is measured, not read from the weights: with the output of all heads replaced by u, `attn_out` is
    W_O u + b. So it is right for every family and engine that the sites are right for.

    Raises:
        UnsupportedModel: `attn_out` is not a linear function of `head_out`, as where a norm comes in between.
    """
    facts = task.subject.facts
    prompt = task.zero_shot(task.splits["train"][0])
    total = torch.zeros(facts.d_model, dtype=torch.float64)
    for layer in sorted({layer for layer, _ in heads}):
        u = torch.zeros(facts.width("head_out"), dtype=torch.float64)
        for head in (head for other, head in heads if other == layer):
            part = slice(head * facts.head_dim, (head + 1) * facts.head_dim)
            u[part] = means[layer][part]

        def attention(factor: float, layer: int = layer, u: torch.Tensor = u) -> torch.Tensor:
            program = program_of(facts, "vector", "patch", "head_out", {layer: {"vector": factor * u}})
            found = task.subject.capture([prompt], "attn_out", [layer], [-1], program)
            return found[0][layer][0].double()

        one, two, back = attention(1.0), attention(2.0), attention(-1.0)
        projected = (one - back) / 2
        if float((two - one - projected).norm()) > LINEAR_TOLERANCE * float(projected.norm() + one.norm()):
            raise UnsupportedModel(
                f"at layer {layer} of {facts.model_id} ({facts.family}) attn_out is not linear in the heads' outputs",
                param="extraction", fix='Use the extraction "mean_difference".')
        total += projected
    return total


def _head_put(facts: ModelFacts, layer: int, head: int, mean: torch.Tensor) -> Program:
    """The head's output replaced by its mean at the last token, the other heads untouched."""
    basis = torch.zeros(facts.head_dim, facts.width("head_out"))
    columns = torch.arange(head * facts.head_dim, (head + 1) * facts.head_dim)
    basis[torch.arange(facts.head_dim), columns] = 1.0
    return program_of(facts, "subspace", "patch", "head_out", {layer: {"basis": basis, "mean": mean}})
