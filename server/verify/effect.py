"""What a steering vector does to a completion, beside random vectors of equal norm, and whether hooks measure the same.

The vector is the mean difference between the activations of a few cheerful and a few gloomy sentences, which any model
of English can tell apart. Every vector steers completions of its own; the effect is the mean over their tokens of
KL(steered || untouched) in nats, as the engine measures it in production.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.engines.base import Engine
from server.engines.data import CaptureRequest, CompareRequest
from server.verify import formulas
from server.verify.exactness import compiled, generated
from server.verify.hooks import Edit, logprobs
from steering.language.vocabulary import Site

CHEERFUL = ("I love this place, it is wonderful.", "What a happy day, everything is great.",
            "The food was delicious and the people kind.", "She smiled with joy at the good news.")
GLOOMY = ("I hate this place, it is terrible.", "What a sad day, everything is awful.",
          "The food was disgusting and the people rude.", "She cried with grief at the bad news.")
PROMPTS = ("The weather today is", "My neighbour told me that")
SITE: Site = "resid_post"
# Length of the vectors, as a share of the usual activation.
SHARE = 0.5
PLACEBOS = 20
NEW_TOKENS = 12
# Of the random vectors as many are measured with hooks too.
CHECKED = 2
# How far the engine's figure may be from that of hooks: nats, and a share of it.
TOLERANCE = {"float32": (0.002, 0.002), "float16": (0.02, 0.05), "bfloat16": (0.05, 0.25)}


@dataclass(frozen=True)
class Run:
    """One vector: per prompt the whole text with the length of its prompt, and the engine's mean KL in nats."""

    vector: Tensor
    texts: Sequence[tuple[Sequence[int], int]]
    kl: float


@dataclass(frozen=True)
class Effect:
    """In nats per token. hooks: (engine, hooks) of each run that was measured both ways."""

    layer: int
    norm: float
    steered: float
    placebo: Sequence[float]
    hooks: Sequence[tuple[float, float]]
    dtype: str

    @property
    def above(self) -> int:
        """Random vectors whose effect is smaller."""
        return sum(self.steered > value for value in self.placebo)

    @property
    def right(self) -> bool:
        """Whether the engine measures what hooks measure, and the vector does anything at all."""
        absolute, share = TOLERANCE[self.dtype]
        return self.steered > absolute and all(abs(a - b) <= absolute + share * b for a, b in self.hooks)


async def measure(engine: Engine, encode: Callable[[str], list[int]]) -> tuple[int, list[Run]]:
    """The layer, and one run of the vector followed by those of the random ones."""
    layers = engine.facts.sites[SITE]
    layer = layers[len(layers) // 2]
    vector, size = await _vector(engine, encode, layer)
    noise = torch.randn(PLACEBOS, len(vector), generator=torch.Generator().manual_seed(0))
    vectors = [v / v.norm() * size * SHARE for v in (vector, *noise)]
    return layer, list(await asyncio.gather(*(_run(engine, encode, layer, v) for v in vectors)))


def checked(model: Any, layer: int, runs: Sequence[Run], dtype: str) -> Effect:
    """The same figures from hooks on `model`."""
    hooks = []
    for run in runs[:1 + CHECKED]:
        edit = Edit(SITE, layer, formulas.add(run.vector, 1.0), lambda prompt, total: [True] * total)
        values = []
        for text, length in run.texts:
            steered, untouched = logprobs(model, text, length, [[edit], []])[:, length - 1:-1]
            values.append((steered.exp() * (steered - untouched)).sum(-1))
        hooks.append((run.kl, float(torch.cat(values).mean())))
    return Effect(layer, float(runs[0].vector.norm()), runs[0].kl, [run.kl for run in runs[1:]], hooks, dtype)


async def _vector(engine: Engine, encode: Callable[[str], list[int]], layer: int) -> tuple[Tensor, float]:
    """The mean difference at the last token, and the usual length of an activation."""
    texts = [encode(text) for text in (*CHEERFUL, *GLOOMY)]
    found = await engine.capture([CaptureRequest(text, {SITE: [layer]}) for text in texts])
    last = torch.stack([captured[SITE][layer][-1] for captured in found])
    size = float(torch.cat([captured[SITE][layer][1:] for captured in found]).norm(dim=-1).median())
    return last[:len(CHEERFUL)].mean(0) - last[len(CHEERFUL):].mean(0), size


async def _run(engine: Engine, encode: Callable[[str], list[int]], layer: int, vector: Tensor) -> Run:
    program = compiled(engine, [{"op": "add", "site": SITE, "layers": [layer], "inline": {"vector": vector.tolist()}}])
    assert program is not None
    prompts = [encode(text) for text in PROMPTS]
    answers = await asyncio.gather(*(generated(engine, prompt, program, max_tokens=NEW_TOKENS, logprobs=None)
                                     for prompt in prompts))
    texts = [([*answer.prompt, *answer.token_ids], len(answer.prompt)) for answer in answers]
    compared = await engine.compare_all([CompareRequest(text, length, program) for text, length in texts])
    return Run(vector, texts, float(torch.cat([one.total.kl for one in compared]).mean()))
