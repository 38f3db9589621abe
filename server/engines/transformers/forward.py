"""Plain forward passes beside generation: teacher-forced scores, comparisons and captures, steered as generation is.

They have a bank of their own, so that a measurement never waits for, or takes, a slot that a request needs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.effects.divergence import Divergence, divergence
from server.engines.base import Captured, CaptureRequest, CompareRequest, Scores
from server.engines.checks import length_of, positions_of
from steering.bank import Bank
from steering.program import Program
from steering.scope import bits_at, touch_map
from steering.sites import attach
from steering.spec import Site
from steering.steerer import Steerer

TOKENS_PER_PASS = 2048
NUM_SLOTS = 2
# Rows of logits that are turned into divergences at once: vocabularies are large.
ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class TokenRun:
    """Tokens to run under a program, from which position on they count as generated, and roles of the prompt part."""

    token_ids: Sequence[int]
    prompt_length: int
    program: Program | None = None
    roles: Sequence[str] | None = None


@dataclass(frozen=True)
class GeneratedPass:
    """What a pass gave where generated tokens were predicted: logits `[G, vocab_size]`, hidden `[G, d_model]`."""

    logits: Tensor
    hidden: Tensor


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
    """Runs the model outside of the batching loop, which must be paused meanwhile. One pass at a time."""

    def __init__(self, model: Any, last_layer: int) -> None:
        self.model = model
        self.bank = Bank(NUM_SLOTS, model.device)
        self.steerer = Steerer(model, self.bank)
        self._last_layer = last_layer

    def score(self, run: TokenRun, full: bool) -> Scores:
        logits = self._forward([run]).logits[0].float()
        logprobs = logits.log_softmax(dim=-1)
        ids = torch.tensor(run.token_ids, device=logits.device)
        chosen = torch.full((len(ids),), torch.nan)
        chosen[1:] = logprobs[:-1].gather(1, ids[1:].unsqueeze(1)).squeeze(1).cpu()
        return Scores(chosen, logprobs.cpu() if full else None)

    def next_logprobs(self, runs: Sequence[TokenRun]) -> Tensor:
        """After each sequence, `[len(runs), vocab_size]` float32 on the CPU; logits are made at their ends alone."""
        ends = sorted({len(run.token_ids) - 1 for run in runs})
        logits = self._forward(runs, logits_to_keep=torch.tensor(ends, device=self.model.device)).logits
        columns = torch.tensor([ends.index(len(run.token_ids) - 1) for run in runs], device=logits.device)
        rows = logits[torch.arange(len(runs), device=logits.device), columns]
        return rows.float().log_softmax(dim=-1).cpu()

    def generated(self, request: CompareRequest, program: Program | None) -> GeneratedPass:
        """A pass over a completion under `program`, which may be another than the one it was generated under."""
        return self.generated_all([request], program)[0]

    def generated_all(self, requests: Sequence[CompareRequest], program: Program | None) -> list[GeneratedPass]:
        """The same for completions that fit one right-padded pass, all under one program."""
        runs = [TokenRun(r.token_ids, r.prompt_length, program, r.roles) for r in requests]
        longest = max(len(r.token_ids) for r in requests)
        kept = longest - min(r.prompt_length for r in requests) + 1
        found: dict[tuple[Site, int], Tensor] = {}
        key: tuple[Site, int] = ("resid_post", self._last_layer)
        logits = self._forward(runs, capture=[key], found=found, logits_to_keep=kept).logits
        hidden = found[key].view(len(requests), longest, -1)
        # Row t predicts token t + 1; of the logits only the last `kept` positions are there.
        rows = [slice(r.prompt_length - 1, len(r.token_ids) - 1) for r in requests]
        first = longest - kept
        return [GeneratedPass(logits[i, row.start - first:row.stop - first], hidden[i, row].float())
                for i, row in enumerate(rows)]

    def capture(self, requests: Sequence[CaptureRequest], program: Program | None) -> list[Captured]:
        """Activations of a batch, after what the program does at the same site."""
        keys = sorted({(site, layer) for request in requests for site, layers in request.sites.items()
                       for layer in layers})
        runs = [TokenRun(r.token_ids, length_of(r), program, r.roles) for r in requests]
        longest = max(len(r.token_ids) for r in requests)
        found: dict[tuple[Site, int], Tensor] = {}
        self._forward(runs, capture=keys, found=found, logits_to_keep=1)
        results: list[Captured] = []
        for i, request in enumerate(requests):
            rows = i * longest + torch.tensor(positions_of(request), dtype=torch.int64)
            results.append({site: {layer: found[site, layer][rows.to(found[site, layer].device)].float().cpu()
                                   for layer in layers} for site, layers in request.sites.items()})
        return results

    @torch.no_grad()
    def _forward(self, runs: Sequence[TokenRun], capture: Sequence[tuple[Site, int]] = (),
                 found: dict[tuple[Site, int], Tensor] | None = None, **kwargs: Any) -> Any:
        """Model output for a right-padded batch. At most `NUM_SLOTS` distinct programs."""
        longest = max(len(run.token_ids) for run in runs)
        ids = torch.zeros(len(runs), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        slots = np.zeros((len(runs), longest), dtype=np.int32)
        bits = np.zeros((len(runs), longest), dtype=np.uint32)
        with ExitStack() as stack:
            for i, run in enumerate(runs):
                length = len(run.token_ids)
                ids[i, :length] = torch.tensor(run.token_ids)
                mask[i, :length] = 1
                if run.program is not None and run.program.acting:
                    slots[i, :length] = self._pin(run.program, stack)
                    bits[i, :length] = _bits(run, run.program)
            plan = self.steerer.plan(slots.ravel(), bits.ravel())
            # After the plan has put its hooks there: what is captured is what steering left.
            for key in capture:
                assert found is not None
                stack.callback(attach(self.model, *key, _keeper(found, key)).remove)
            with self.steerer.acting(plan):
                return self.model(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device),
                                  use_cache=False, **kwargs)

    def _pin(self, program: Program, stack: ExitStack) -> int:
        slot = self.bank.acquire(program)
        if slot is None:
            raise ValueError(f"more than {NUM_SLOTS} programs in one pass")
        stack.callback(self.bank.release, program)
        return slot


def compared(steered: GeneratedPass, other: GeneratedPass, request: CompareRequest) -> Divergence:
    """Divergence of two passes, a block of rows at a time, on the CPU."""
    chosen = torch.tensor(request.token_ids[request.prompt_length:], device=steered.logits.device)
    parts = [divergence(steered.logits[i:i + ROWS_AT_ONCE], other.logits[i:i + ROWS_AT_ONCE],
                        chosen[i:i + ROWS_AT_ONCE], request.end_ids) for i in range(0, len(chosen), ROWS_AT_ONCE)]
    whole = Divergence.join(parts)
    return Divergence(**{name: value.cpu() for name, value in vars(whole).items()})


def _keeper(found: dict[tuple[Site, int], Tensor], key: tuple[Site, int]) -> Callable[[Tensor], Tensor]:
    def keep(h: Tensor) -> Tensor:
        found[key] = h
        return h

    return keep


def _bits(run: TokenRun, program: Program) -> Any:
    length = len(run.token_ids)
    touch = touch_map(program.scopes, run.token_ids[:run.prompt_length], length - run.prompt_length, run.roles)
    return bits_at(touch, program.rules, np.arange(length), np.asarray(run.token_ids, dtype=np.int64))
