"""Does a model need its massive activations? `python -m lab.massive FOLDER_OF_SMOLLM2` tells.

By plain hooks, the largest entry at the first position, behind the block where it is largest, is made another, and
what prose's perplexity becomes is told. Controls: the mean of the entry in other texts, other entries of the same
state, and the same dim at other positions. Last, a random vector a quarter as long as ordinary states are is added to
all tokens behind that block, with the first position and without it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab.paths import LAB_DIR

PROSE = LAB_DIR.parent / "docs" / "decisions"
TEXTS, LENGTH, DRAWS = 24, 64, 5
# What becomes of the states `[T, d]` of a text behind the block.
Edit = Callable[[Tensor], Tensor]


def main(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    paragraphs = [part.replace("\n", " ") for file in sorted(PROSE.glob("00[01]*.md"))
                  for part in file.read_text().split("\n\n") if len(part) > 200 and part[0].isalpha()]
    texts = [tokenizer(text)["input_ids"][:LENGTH] for text in paragraphs[:2 * TEXTS]]
    fitted, tested = texts[::2], texts[1::2]
    layer, dim, mean, size = found(model, fitted)
    print(f"behind block {layer}, dim {dim}: {mean:.0f} at the first position; ordinary states are {size:.0f} long\n")
    print(f"perplexity of {len(tested)} texts of up to {LENGTH} tokens\n")
    for name, edit in edits(model, dim, mean, size).items():
        some = [perplexity(model, tested, layer, one) for one in (edit if isinstance(edit, list) else [edit])]
        spread = f" ({min(some):.2f} to {max(some):.2f})" if len(some) > 1 else ""
        print(f"| {name} | {sum(some) / len(some):.2f}{spread} |")


@torch.no_grad()
def found(model: Any, texts: Sequence[list[int]]) -> tuple[int, int, float, float]:
    """Layer, dim and mean value of the largest entry at first positions, and the median length of later states."""
    states = [torch.stack(model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[1:-1])[:, 0]
              for text in texts]
    first = torch.stack([one[:, 0] for one in states])
    place = int(first.abs().mean(0).argmax())
    layer, dim = divmod(place, first.shape[-1])
    later = torch.cat([one[layer, 1:] for one in states])
    return layer, dim, float(first[:, layer, dim].mean()), float(later.norm(dim=-1).median())


def edits(model: Any, dim: int, mean: float, size: float) -> dict[str, Edit | list[Edit]]:
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    others = [int(d) for d in torch.randperm(width, generator=generator)[:DRAWS] if int(d) != dim]
    drawn = [torch.randn(width, generator=generator) for _ in range(DRAWS)]

    def entry(value: Callable[[Tensor], Tensor | float], at: int = dim) -> Edit:
        def edit(h: Tensor) -> Tensor:
            out = h.clone()
            out[0, at] = value(h[0, at])
            return out

        return edit

    def next_largest(h: Tensor) -> Tensor:
        out = h.clone()
        out[0, h[0].abs().topk(2).indices[1]] = 0
        return out

    def elsewhere(h: Tensor) -> Tensor:
        out = h.clone()
        out[1:, dim] = 0
        return out

    def added(v: Tensor, start: int) -> Edit:
        def edit(h: Tensor) -> Tensor:
            out = h.clone()
            out[start:] += 0.25 * size * v / v.norm()
            return out

        return edit

    return {"untouched": lambda h: h, "its mean in other texts": entry(lambda _: mean),
            "zero": entry(lambda _: 0.0), "sign turned": entry(lambda x: -x),
            "nine tenths of it": entry(lambda x: x * 0.9), "half of it": entry(lambda x: x / 2),
            "a tenth of it": entry(lambda x: x / 10),
            "another entry of the first position zero": [entry(lambda _: 0.0, other) for other in others],
            "the next largest entry zero": next_largest, "the same dim zero at all other positions": elsewhere,
            "a random vector added to all tokens": [added(v, 0) for v in drawn],
            "a random vector added to all but the first": [added(v, 1) for v in drawn]}


@torch.no_grad()
def perplexity(model: Any, texts: Sequence[list[int]], layer: int, edit: Edit) -> float:
    def hook(module: Any, given: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        moved = edit(h[0])[None]
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = model.model.layers[layer].register_forward_hook(hook)
    total = count = 0.0
    try:
        for text in texts:
            ids = torch.tensor([text])
            logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total -= float(logits.gather(1, ids[0, 1:, None]).sum())
            count += len(text) - 1
    finally:
        handle.remove()
    return math.exp(total / count)


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
