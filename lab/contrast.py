"""Does contrast decoding find more right answers? `python -m lab.contrast [lab-moe | FOLDER_OF_SMOLLM2]` tells.

Of each answer two figures are told: whether greedy decoding writes it, and how probable it is when tokens are sampled
at temperature 1. Greedy decoding writes an answer if each of its tokens is the likeliest one behind those before. So
one pass over prompt and answer tells for the strong run, and one for each weak run, whatever alpha and beta are. The
weak run and beta are chosen on dev items, and the figures are of test items.

Sharpened logits are the strong run's alone, times a factor, with the same plausible tokens; the factor gives them on
dev items the entropy that the contrast has there. They cannot change what greedy decoding writes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.datasets import load
from lab.paths import model_path
from lab.real.facts import relations

ALPHA = 0.1
BETAS = (0.1, 0.25, 0.5, 1.0, 2.0)
DRAWS = 20
RESAMPLED = 2000
BATCH = 64
# Hooks that make a run weak.
Weak = Callable[[Any], "contextmanager[None]"]
Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Read:
    """Logits in front of every answer token, `[N, vocab_size]`, the tokens, `[N]`, and the item of each, `[N]`."""

    logits: Tensor
    tokens: Tensor
    items: Tensor

    def told(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of each item whether its answer is written by greedy decoding, and its probability."""
        count = int(self.items.max()) + 1
        right = (scores.argmax(-1) == self.tokens).double()
        chances = scores.double().log_softmax(-1).gather(1, self.tokens[:, None]).squeeze(1)
        written = torch.ones(count, dtype=torch.float64).scatter_reduce(0, self.items, right, "amin")
        return written, torch.zeros(count, dtype=torch.float64).index_add(0, self.items, chances).exp()


@torch.inference_mode()
def read(model: Any, tokenizer: Any, records: Records) -> Read:
    logits, tokens, items = [], [], []
    for start in range(0, len(records), BATCH):
        part = records[start:start + BATCH]
        prompts = [tokenizer(record["text"])["input_ids"] for record in part]
        answers = [tokenizer(record["answer"], add_special_tokens=False)["input_ids"] for record in part]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.tensor([p + a + [0] * (longest - len(p) - len(a)) for p, a in zip(prompts, answers, strict=True)])
        found = model(input_ids=ids, use_cache=False).logits
        for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            logits.append(found[n, len(prompt) - 1:len(prompt) + len(answer) - 1].float())
            tokens += answer
            items += [start + n] * len(answer)
    return Read(torch.cat(logits), torch.tensor(tokens), torch.tensor(items))


def plausible(strong: Tensor) -> Tensor:
    return strong >= strong.amax(-1, keepdim=True) + torch.tensor(ALPHA).log()


def contrast(strong: Tensor, weak: Tensor, beta: float) -> Tensor:
    return ((1 + beta) * strong - beta * weak).masked_fill(~plausible(strong), -torch.inf)


def sharpened(strong: Tensor, factor: float) -> Tensor:
    return (factor * strong).masked_fill(~plausible(strong), -torch.inf)


def entropy(scores: Tensor) -> float:
    logs = scores.double().log_softmax(-1)
    return float(-(logs.exp() * logs.masked_fill(logs.isinf(), 0)).sum(-1).mean())


def as_sharp(strong: Tensor, goal: float) -> float:
    """The factor that gives the plausible tokens this entropy."""
    low, high = 0.01, 100.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropy(sharpened(strong, middle)) > goal else (low, middle)
    return low


# What makes a run weak.

@contextmanager
def routed(model: Any, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """One expert for each token, at every mixture layer, with weight 1. choose: router logits `[T, E]` -> `[T]`."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        logits, weights, experts = output
        one = choose(logits)
        # The other places of the k go to experts with weight 0, each token's list without repeats.
        others = (one[:, None] + torch.arange(experts.shape[1])) % logits.shape[1]
        only = torch.zeros_like(weights)
        only[:, 0] = 1
        return logits, only, others.to(experts.dtype)

    with ExitStack() as stack:
        for layer in model.model.layers:
            stack.callback(layer.mlp.gate.register_forward_hook(hook).remove)
        yield


def rank(place: int) -> Weak:
    return lambda model: routed(model, lambda logits: logits.argsort(-1, descending=True)[:, place])


def random_expert(seed: int) -> Weak:
    generator = torch.Generator().manual_seed(seed)
    return lambda model: routed(model, lambda logits: torch.randint(logits.shape[1], (len(logits),),
                                                                    generator=generator))


def silent(layers: Sequence[int]) -> Weak:
    """Nothing is written by these layers. Of the last ones: an early exit."""

    @contextmanager
    def weak(model: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for n in layers:
                block = model.model.layers[n]
                stack.callback(block.self_attn.register_forward_hook(
                    lambda module, args, output: (output[0] * 0, *output[1:])).remove)
                stack.callback(block.mlp.register_forward_hook(lambda module, args, output: output * 0).remove)
            yield

    return weak


def compare(model: Any, tokenizer: Any, name: str, dev: Records, test: Records, weak: dict[str, Weak],
            random: Sequence[Weak]) -> list[str]:
    """Rows of the table for one skill."""
    strong = read(model, tokenizer, dev), read(model, tokenizer, test)
    base = strong[1].told(strong[1].logits)
    best: tuple[float, float, str, float] | None = None
    for label, hooks in weak.items():
        with hooks(model):
            other = read(model, tokenizer, dev).logits
        for beta in BETAS:
            written, chance = strong[0].told(contrast(strong[0].logits, other, beta))
            found = (float(written.mean()), float(chance.mean()), label, beta)
            best = found if best is None or found[:2] > best[:2] else best
    assert best is not None
    label, beta = best[2:]
    ours = chosen(model, tokenizer, dev, test, weak[label], beta, strong)
    factor = as_sharp(strong[0].logits, ours[2])
    sharp = strong[1].told(sharpened(strong[1].logits, factor))
    rows = [row(f"{name}, {len(test)} answers", "as it is", base, base),
            row("", f"contrast with {label}, beta {beta:g}", ours[:2], base),
            row("", f"sharpened logits, times {factor:.2f}", sharp, base)]
    draws = []
    for hooks in random:
        with hooks(model):
            other = read(model, tokenizer, dev).logits
        own = max(BETAS, key=lambda b: tuple(float(x.mean()) for x in strong[0].told(
            contrast(strong[0].logits, other, b))))
        draws.append(chosen(model, tokenizer, dev, test, hooks, own, strong)[:2])
    if draws:
        written, chance = ([float(one[n].mean()) for one in draws] for n in (0, 1))
        rows.append(f"| | contrast with a random expert for each token, {len(draws)} draws | {drawn(written)} | | "
                    f"{drawn(chance)} | |")
    return rows


def chosen(model: Any, tokenizer: Any, dev: Records, test: Records, hooks: Weak, beta: float,
           strong: tuple[Read, Read]) -> tuple[Tensor, Tensor, float]:
    """On the test items, and the entropy on the dev items."""
    with hooks(model):
        first, second = read(model, tokenizer, dev).logits, read(model, tokenizer, test).logits
    return (*strong[1].told(contrast(strong[1].logits, second, beta)),
            entropy(contrast(strong[0].logits, first, beta)))


def row(name: str, what: str, found: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> str:
    cells = []
    for ours, before in zip(found, base, strict=True):
        low, high = interval(ours - before)
        cells += [f"{float(ours.mean()):.3f}", "" if ours is before else f"{low:+.3f} to {high:+.3f}"]
    return f"| {name} | {what} | {' | '.join(cells)} |"


def interval(differences: Tensor) -> tuple[float, float]:
    """95 % of the mean, by paired bootstrap over the items."""
    picked = torch.randint(len(differences), (RESAMPLED, len(differences)), generator=torch.Generator().manual_seed(0))
    low, high = differences[picked].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def drawn(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sums(split: str) -> list[dict[str, Any]]:
    """Additions and subtractions of numbers below 50; a pair of numbers is in one split."""
    pairs = [(a, b) for a in range(3, 50, 4) for b in range(2, 50, 5)]
    found = []
    for n, (a, b) in enumerate(pairs):
        if ("dev", "test", "test")[n % 3] == split:
            found += [{"text": f"2 + 3 = 5\n7 + 12 = 19\n{a} + {b} =", "answer": f" {a + b}"},
                      {"text": f"9 - 4 = 5\n31 - 12 = 19\n{a + b} - {b} =", "answer": f" {a}"}]
    return found


def main(what: str) -> None:
    print("| what | decoded by | written greedily | against as it is | probability | against as it is |")
    print("|---|---|---|---|---|---|")
    folder = model_path(what) if what == "lab-moe" else Path(what)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if what == "lab-moe":
        weak = {f"the expert of rank {n}": rank(n) for n in (0, 1, 2, 3, 5, 8)}
        draws = [random_expert(seed) for seed in range(DRAWS)]
        skills = {name: [load(data, split) for split in ("dev", "test")]
                  for name, data in (("facts", "relations"), ("calendar", "calendar"))}
    else:
        depth = model.config.num_hidden_layers
        weak = {f"an exit behind layer {n}": silent(range(n + 1, depth)) for n in (9, 14, 19, 24)} | {
            f"layers {n} to {n + 4} silent": silent(range(n, n + 5)) for n in (5, 10, 15, 20)}
        draws = []
        skills = {"facts": [[one for one in relations() if one["split"] == split] for split in ("dev", "test")],
                  "sums": [sums("dev"), sums("test")]}
    for name, (dev, test) in skills.items():
        for line in compare(model, tokenizer, f"{folder.name}, {name}", dev, test, weak, draws):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "lab-moe")
