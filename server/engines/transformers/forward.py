"""Plain forward passes beside generation: teacher-forced scores and captures, steered like generation is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engines.base import Captured, CaptureRequest, Scores
from steering.errors import InvalidRequest
from steering.program import Program
from steering.scope import bits_at, touch_map
from steering.sites import attach
from steering.spec import Site
from steering.steerer import Steerer

TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class TokenRun:
    """Tokens to run, from which position on they count as generated, and chat roles of the prompt part."""

    token_ids: Sequence[int]
    prompt_length: int
    roles: Sequence[str] | None = None


def batches(lengths: Sequence[int], tokens_per_pass: int = TOKENS_PER_PASS) -> Iterator[list[int]]:
    """Indices of sequences that go into one right-padded pass, in order."""
    chosen: list[int] = []
    longest = 0
    for i, length in enumerate(lengths):
        if chosen and max(longest, length) * (len(chosen) + 1) > tokens_per_pass:
            yield chosen
            chosen, longest = [], 0
        chosen.append(i)
        longest = max(longest, length)
    if chosen:
        yield chosen


class ForwardPass:
    """Runs padded batches through the model under one program. The engine's own loop must be paused meanwhile."""

    def __init__(self, model: Any, steerer: Steerer) -> None:
        self.model = model
        self.steerer = steerer

    @torch.no_grad()
    def run(self, sequences: Sequence[TokenRun], program: Program | None, slot: int, **kwargs: Any) -> Any:
        """Model output for a right-padded batch; every token that `program` touches is steered from `slot`."""
        longest = max(len(s.token_ids) for s in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        slots = np.zeros((len(sequences), longest), dtype=np.int32)
        bits = np.zeros((len(sequences), longest), dtype=np.uint32)
        for i, sequence in enumerate(sequences):
            length = len(sequence.token_ids)
            ids[i, :length] = torch.tensor(sequence.token_ids)
            mask[i, :length] = 1
            if program is not None:
                slots[i, :length] = slot
                bits[i, :length] = _bits(sequence, program)
        plan = self.steerer.plan(slots.ravel(), bits.ravel())
        with self.steerer.acting(plan):
            return self.model(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device),
                              use_cache=False, **kwargs)

    def score(self, sequence: TokenRun, program: Program | None, slot: int, full: bool) -> Scores:
        logits = self.run([sequence], program, slot).logits[0].float()
        logprobs = logits.log_softmax(dim=-1)
        ids = torch.tensor(sequence.token_ids, device=logits.device)
        chosen = torch.full((len(ids),), torch.nan)
        chosen[1:] = logprobs[:-1].gather(1, ids[1:].unsqueeze(1)).squeeze(1).cpu()
        return Scores(chosen, logprobs.cpu() if full else None)

    def capture(self, requests: Sequence[CaptureRequest], program: Program | None, slot: int) -> list[Captured]:
        """Activations of a batch. Capturing hooks come after the steering ones, so they see what those left."""
        keys = sorted({(site, layer) for request in requests for site, layers in request.sites.items()
                       for layer in layers})
        sequences = [TokenRun(r.token_ids, len(r.token_ids)) for r in requests]
        longest = max(len(r.token_ids) for r in requests)
        found: dict[tuple[Site, int], torch.Tensor] = {}
        if program is not None:
            # Attaches the program's hooks before ours.
            self.steerer.plan(np.full(1, slot, np.int32), np.full(1, program.acting, np.uint32))
        with ExitStack() as stack:
            for key in keys:
                stack.callback(attach(self.model, *key, _keeper(found, key)).remove)
            self.run(sequences, program, slot, logits_to_keep=1)
        results: list[Captured] = []
        for i, request in enumerate(requests):
            rows = i * longest + torch.tensor(_positions(request), dtype=torch.int64)
            results.append({site: {layer: found[site, layer][rows.to(found[site, layer].device)].float().cpu()
                                   for layer in layers} for site, layers in request.sites.items()})
        return results


def _keeper(found: dict[tuple[Site, int], torch.Tensor], key: tuple[Site, int]) -> Callable[[Tensor], Tensor]:
    def keep(h: Tensor) -> Tensor:
        found[key] = h
        return h

    return keep


def _bits(sequence: TokenRun, program: Program) -> Any:
    length = len(sequence.token_ids)
    touch = touch_map(program.scopes, sequence.token_ids[:sequence.prompt_length], length - sequence.prompt_length,
                      sequence.roles)
    return bits_at(touch, program.rules, np.arange(length), np.asarray(sequence.token_ids, dtype=np.int64))


def _positions(request: CaptureRequest) -> list[int]:
    length = len(request.token_ids)
    if request.positions is None:
        return list(range(length))
    for position in request.positions:
        if not -length <= position < length:
            raise InvalidRequest(f"position {position} lies outside of {length} tokens", param="positions")
    return [position % length for position in request.positions]


def check_sites(sites: Mapping[Site, Sequence[int]]) -> None:
    """Refuse a capture of nothing."""
    if not any(sites.values()):
        raise InvalidRequest("no site and layer to capture", param="sites")
