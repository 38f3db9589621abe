"""A stand-in for an engine whose activations are known: item + label * shift * direction + noise, per layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from vectors.extract import Cancelled, Extraction, Pair, Progress, parse_request, prepare
from vectors.extract.subject import Programs, Prompt, Tokens, Written

WIDTH = 48
NUM_LAYERS = 4
# Length of the concept's shift at each layer: absent, weak, strong, middling.
SHIFTS = (0.0, 1.0, 8.0, 3.0)
NEGATIVE, POSITIVE = 1, 2
FILLER = 3
FIRST_ITEM = 10

FACTS = ModelFacts(
    model_id="planted", fingerprint="f" * 16, family="planted", num_layers=NUM_LAYERS, d_model=WIDTH, num_heads=2,
    head_dim=8, d_ff=20, vocab_size=1000, context_length=16,
    sites={"resid_pre": (0, 1, 2, 3), "resid_post": (0, 1, 2, 3), "attn_out": (0, 1, 2, 3), "mlp_out": (0, 1, 2, 3)})


def unit(seed: int) -> torch.Tensor:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()


DIRECTIONS = tuple(unit(900 + layer) for layer in range(NUM_LAYERS))


class Planted:
    """`Subject` that reads only. A text is (filler, item, label); only the last position carries the label.

    vary: how much the shift differs from pair to pair along an unrelated axis, the trap of centred differences.
    """

    def __init__(self, *, vary: float = 0.0, constant_layers: Sequence[int] = ()) -> None:
        self.vary = vary
        self.constant_layers = set(constant_layers)
        self.calls: list[int] = []

    @property
    def facts(self) -> ModelFacts:
        return FACTS

    def encode(self, prompt: Prompt) -> Tokens:
        return tuple(token for token in prompt if isinstance(token, int))

    def encode_continuation(self, text: str) -> Tokens:
        raise NotImplementedError

    def next_logprobs(self, texts: Sequence[Sequence[int]], program: Programs = None) -> torch.Tensor:
        raise NotImplementedError

    def generate(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Program | None = None) -> list[str]:
        raise NotImplementedError

    def write(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Programs = None) -> list[Written]:
        raise NotImplementedError

    def continuation_logprobs(self, texts: Sequence[Sequence[int]], starts: Sequence[int], program: Programs = None
                              ) -> list[float]:
        raise NotImplementedError

    def capture(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                positions: Sequence[int] | None, program: Program | None = None) -> list[Mapping[int, torch.Tensor]]:
        self.calls.append(sum(map(len, texts)))
        return [{layer: self.text(ids, layer, positions) for layer in layers} for ids in texts]

    def text(self, ids: Sequence[int], layer: int, positions: Sequence[int] | None) -> torch.Tensor:
        rows = torch.stack([self.token(ids, n, layer) for n in range(len(ids))])
        return (rows if positions is None else rows[list(positions)]).float()

    def token(self, ids: Sequence[int], position: int, layer: int) -> torch.Tensor:
        if layer in self.constant_layers:
            return torch.ones(WIDTH, dtype=torch.float64)
        if position == 0:
            # An attention sink: huge, and the same in all texts.
            return 1000.0 * unit(77)
        item, label = ids[1], ids[-1]
        noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 * item + 10 * label + layer),
                            dtype=torch.float64)
        sign = 0.5 if label == POSITIVE else -0.5
        spread = torch.randn((), generator=torch.Generator().manual_seed(item), dtype=torch.float64)
        return (3.0 * unit(item) + 0.15 * noise + sign * SHIFTS[layer] * DIRECTIONS[layer]
                + sign * self.vary * spread * unit(55))


def pairs(count: int, *, first: int = 0) -> list[Pair]:
    return [Pair(positive=(FILLER, FIRST_ITEM + n, POSITIVE), negative=(FILLER, FIRST_ITEM + n, NEGATIVE))
            for n in range(first, first + count)]


Fields = dict[str, Any]


def request(given: Sequence[Pair], **options: object) -> Fields:
    return {"name": "planted", "pairs": [pair.model_dump(mode="json") for pair in given], **options}


def run(fields: Fields, planted: Planted, progress: Progress, cancelled: Cancelled) -> Extraction:
    """By the contrastive method that `fields` names."""
    method = fields.get("method", "mean_difference")
    parsed = parse_request(method, {name: value for name, value in fields.items() if name != "method"})
    return prepare(method, parsed, planted, "test").run(progress, cancelled)


def silent(share: float, stage: str) -> None:
    """A progress callback for tests that look at nothing but the result."""


def never() -> bool:
    return False


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a.double() @ b.double() / a.double().norm() / b.double().norm())
