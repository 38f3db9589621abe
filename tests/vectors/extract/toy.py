"""A transformer written out by hand, whose heads, neurons and read-out are functions that a test plants.

It runs compiled programs through the project's own kernels at every site, so an intervention does to it what it would
do to a model. Words are tokens; token 0 is put before every prompt.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch

from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.ops.kernel import get_kernel
from steering.programs.program import Program
from vectors.extract.subject import Programs, Prompt, Tokens, Turn, Written, one_each

D_MODEL, NUM_HEADS, HEAD_DIM, D_FF, NUM_LAYERS, VOCAB = 32, 4, 8, 32, 3, 400


@cache
def noise(*key: object, width: int = D_MODEL) -> torch.Tensor:
    """Standard normal `[width]` float64 that depends on `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.randn(width, generator=generator, dtype=torch.float64)


def unit(*key: object, width: int = D_MODEL) -> torch.Tensor:
    vector = noise(*key, width=width)
    return vector / vector.norm()


class Toy:
    """`Subject`. Tests override `embed`, `heads`, `neurons`, `router` and `read`."""

    def __init__(self, *, num_experts: int = 0, experts_per_token: int = 0) -> None:
        layers = tuple(range(NUM_LAYERS))
        sites: dict[Site, tuple[int, ...]] = {
            "resid_pre": layers, "resid_post": layers, "attn_out": layers, "mlp_out": layers, "head_out": layers,
            "mlp_act": layers}
        if num_experts:
            sites["router"] = layers
        self._facts = ModelFacts(
            model_id="toy", fingerprint="f" * 16, family="toy", num_layers=NUM_LAYERS, d_model=D_MODEL,
            num_heads=NUM_HEADS, head_dim=HEAD_DIM, d_ff=D_FF, vocab_size=VOCAB, context_length=256,
            num_experts=num_experts, experts_per_token=experts_per_token, sites=sites)
        self.words: list[str] = ["<s>"]
        self.passes = 0
        self.largest_batch = 0
        self.w_o = torch.stack([torch.stack([noise("o", n, i, width=NUM_HEADS * HEAD_DIM) for i in range(D_MODEL)])
                                for n in layers]) / 6
        self.w_down = torch.stack([torch.stack([noise("down", n, i, width=D_FF) for i in range(D_MODEL)])
                                   for n in layers]) / 6

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    # What a test plants.

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.stack([noise("e", token) for token in ids])

    def heads(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(ids), NUM_HEADS * HEAD_DIM, dtype=torch.float64)

    def neurons(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(ids), D_FF, dtype=torch.float64)

    def router(self, layer: int, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def read(self, ids: Sequence[int], resid: torch.Tensor) -> torch.Tensor:
        """Logits `[vocab]` of the next token, from `resid [d]` at the last one."""
        return torch.zeros(VOCAB, dtype=torch.float64)

    # The subject.

    def token(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def encode(self, prompt: Prompt) -> Tokens:
        if isinstance(prompt, str):
            return (0, *self.encode_continuation(prompt))
        if isinstance(prompt[0], Turn):
            return self.encode(" ".join(f"{turn.role}: {turn.content}" for turn in prompt if isinstance(turn, Turn)))
        return tuple(token for token in prompt if isinstance(token, int))

    def encode_continuation(self, text: str) -> Tokens:
        return tuple(self.token(word) for word in text.split())

    def said(self, ids: Sequence[int]) -> list[str]:
        return [self.words[token] if token < len(self.words) else f"w{token}" for token in ids]

    def capture(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                positions: Sequence[int] | None, program: Program | None = None) -> list[Mapping[int, torch.Tensor]]:
        self.largest_batch = max(self.largest_batch, sum(map(len, texts)))
        found: list[Mapping[int, torch.Tensor]] = []
        for ids in texts:
            seen: dict[tuple[Site, int], torch.Tensor] = {}
            self.forward(ids, program, len(ids), seen)
            rows = list(range(len(ids))) if positions is None else list(positions)
            found.append({layer: seen[site, layer][rows].float() for layer in layers})
        return found

    def next_logprobs(self, texts: Sequence[Sequence[int]], program: Programs = None) -> torch.Tensor:
        return torch.stack([self.forward(ids, own, len(ids), {}).log_softmax(dim=-1).float()
                            for ids, own in zip(texts, one_each(program, len(texts)), strict=True)])

    def generate(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Program | None = None) -> list[str]:
        said = []
        for text in texts:
            ids = list(text)
            for _ in range(max_tokens):
                ids.append(int(self.forward(ids, program, len(text), {}).argmax()))
            said.append(" ".join(self.said(ids[len(text):])))
        return said

    def write(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Programs = None) -> list[Written]:
        found = []
        for text, own in zip(texts, one_each(program, len(texts)), strict=True):
            said = self.generate([text], max_tokens, own)[0]
            found.append(Written(self.encode_continuation(said), said, False))
        return found

    def continuation_logprobs(self, texts: Sequence[Sequence[int]], starts: Sequence[int], program: Programs = None
                              ) -> list[float]:
        found = []
        for ids, start, own in zip(texts, starts, one_each(program, len(texts)), strict=True):
            found.append(sum(float(self.forward(ids[:n], own, start, {}).log_softmax(dim=-1)[ids[n]])
                             for n in range(start, len(ids))) / (len(ids) - start))
        return found

    def forward(self, ids: Sequence[int], program: Program | None, prompt_length: int,
                seen: dict[tuple[Site, int], torch.Tensor]) -> torch.Tensor:
        self.passes += 1
        touched = np.zeros(len(ids), dtype=np.uint32)
        if program is not None:
            touched = program.touch(ids[:prompt_length], len(ids) - prompt_length).bits_of(ids)

        def at(site: Site, layer: int, h: torch.Tensor) -> torch.Tensor:
            for j, item in enumerate(program.compiled if program is not None else ()):
                row = item.rows.get((site, layer))
                tokens = torch.from_numpy(np.flatnonzero(touched & np.uint32(1 << j)))
                if row is None or not len(tokens):
                    continue
                rows = {name: t.expand(len(tokens), *t.shape) for name, t in row.tensors.items()}
                h = h.index_copy(0, tokens, get_kernel(row.kernel)(h[tokens].float(), rows).double())
            seen[site, layer] = h
            return h

        resid = self.embed(ids)
        for layer in range(NUM_LAYERS):
            resid = at("resid_pre", layer, resid)
            heads = at("head_out", layer, self.heads(layer, ids, resid))
            resid = resid + at("attn_out", layer, heads @ self.w_o[layer].T)
            if self._facts.num_experts:
                seen["router", layer] = self.router(layer, ids, resid)
            neurons = at("mlp_act", layer, self.neurons(layer, ids, resid))
            resid = resid + at("mlp_out", layer, neurons @ self.w_down[layer].T)
            resid = at("resid_post", layer, resid)
        return self.read(ids, resid[-1])


def silent(share: float, stage: str) -> None:
    """A progress callback for tests that look at nothing but the result."""


def never() -> bool:
    return False


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a.double() @ b.double() / a.double().norm() / b.double().norm())
