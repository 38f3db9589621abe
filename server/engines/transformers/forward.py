"""Plain forward passes beside generation: teacher-forced scores, comparisons and captures, steered as generation is.

They have a bank of their own, so that a measurement never waits for, or takes, a slot that a request needs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engines.checks import length_of, positions_of
from server.engines.data import Captured, CaptureRequest, CompareRequest, Scores
from server.engines.scoring import placed, scores_of
from server.engines.transformers.finite import Watch
from server.engines.transformers.reading import read_untouched
from steering.acting.containment import UNLIMITED, Fault, StepLimit, fault_error, model_error
from steering.acting.record import Record, Taken
from steering.acting.steerer import Steerer
from steering.divergence import Divergence, divergence
from steering.language.errors import TrimtabError
from steering.language.vocabulary import Site
from steering.models.taps import attach
from steering.programs.program import Program
from steering.residency.bank import Bank

TOKENS_PER_PASS = 2048
NUM_SLOTS = 2
# Rows of logits that are turned into divergences at once: vocabularies are large.
ROWS_AT_ONCE = 128
# Logits `[n, vocab_size]` of some of the generated tokens.
LogitsOf = Callable[[slice], Tensor]


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

    def rows(self, part: slice) -> Tensor:
        return self.logits[part]


def padded_passes(lengths: Sequence[int], tokens_per_pass: int = TOKENS_PER_PASS) -> Iterator[list[int]]:
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

    def __init__(self, model: Any, last_layer: int, watch: Watch, limit: StepLimit) -> None:
        self.model = model
        self.watch = watch
        self.limit = limit
        self.bank = Bank(NUM_SLOTS, model.device)
        self.steerer = Steerer(model, self.bank)
        self._last_layer = last_layer

    def score(self, run: TokenRun, full: bool, top: int | None) -> Scores:
        logits = self._forward([run]).logits[0]
        targets = torch.tensor([*run.token_ids[1:], 0], device=logits.device)
        parts, everything = [], []
        for start in range(0, len(logits), ROWS_AT_ONCE):
            logprobs = logits[start:start + ROWS_AT_ONCE].float().log_softmax(dim=-1)
            parts.append(placed(logprobs, targets[start:start + ROWS_AT_ONCE], top))
            if full:
                everything.append(logprobs.cpu())
        return scores_of(parts, torch.cat(everything) if full else None)

    def next_logprobs(self, runs: Sequence[TokenRun]) -> Tensor:
        """After each sequence, `[len(runs), vocab_size]` float32 on the CPU; logits are made at their ends alone."""
        ends = sorted({len(run.token_ids) - 1 for run in runs})
        logits = self._forward(runs, kept=ends).logits
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
        first = min(r.prompt_length for r in requests) - 1
        found: dict[tuple[Site, int], Tensor] = {}
        key: tuple[Site, int] = ("resid_post", self._last_layer)
        logits = self._forward(runs, capture=[key], found=found, kept=range(first, longest)).logits
        hidden = found[key].view(len(requests), longest, -1)
        # Row t predicts token t + 1; of the logits only positions from `first` on are there.
        rows = [slice(r.prompt_length - 1, len(r.token_ids) - 1) for r in requests]
        return [GeneratedPass(logits[i, row.start - first:row.stop - first], hidden[i, row].float())
                for i, row in enumerate(rows)]

    def capture(self, requests: Sequence[CaptureRequest], program: Program | None) -> list[Captured]:
        """Activations of a batch, after what the program does at the same site."""
        keys = sorted({(site, layer) for request in requests for site, layers in request.sites.items()
                       for layer in layers})
        if program is None or not program.acting:
            read = read_untouched(self.model, [r.token_ids for r in requests], keys)
            self.watch.forget()
            # What is not finite is told apart below, from whole passes.
            if read is not None:
                return [{site: {layer: read[site, layer][i][positions_of(r)].float().cpu() for layer in layers}
                         for site, layers in r.sites.items()} for i, r in enumerate(requests)]
        runs = [TokenRun(r.token_ids, length_of(r), program, r.roles) for r in requests]
        longest = max(len(r.token_ids) for r in requests)
        found: dict[tuple[Site, int], Tensor] = {}
        self._forward(runs, capture=keys, found=found, kept=[longest - 1])
        results: list[Captured] = []
        for i, request in enumerate(requests):
            rows = i * longest + torch.tensor(positions_of(request), dtype=torch.int64)
            results.append({site: {layer: found[site, layer][rows.to(found[site, layer].device)].float().cpu()
                                   for layer in layers} for site, layers in request.sites.items()})
        return results

    def is_finite(self, token_ids: Sequence[int]) -> bool:
        """Whether the untouched model stays finite over these tokens."""
        runs = [TokenRun(token_ids, len(token_ids))]
        output, _ = self._run(runs, UNLIMITED, (), None, logits_to_keep=1)
        return not self._broken(runs, output.logits, [len(token_ids) - 1])

    def _forward(self, runs: Sequence[TokenRun], capture: Sequence[tuple[Site, int]] = (),
                 found: dict[tuple[Site, int], Tensor] | None = None, kept: Sequence[int] | None = None) -> Any:
        """Model output for a right-padded batch. At most `NUM_SLOTS` distinct programs.

        Args:
            kept: positions whose logits are made, the same in every sequence; None for all of them.

        Raises:
            SteeringOverflow, SteeringLimit: what a program asks for cannot be carried out.
            ModelOverflow: the model itself makes values that are not finite.
        """
        limit = self.limit if all(run.program is None or run.program.limited for run in runs) else UNLIMITED
        keeping = {} if kept is None else {"logits_to_keep": torch.tensor(kept, device=self.model.device)}
        output, record = self._run(runs, limit, capture, found, **keeping)
        record.check([run.program for run in runs], _longest(runs))
        broken = self._broken(runs, output.logits, range(_longest(runs)) if kept is None else kept)
        if broken:
            raise self._overflow(runs, broken[0], limit)
        return output

    def _broken(self, runs: Sequence[TokenRun], logits: Tensor, kept: Sequence[int]) -> list[int]:
        """Sequences of the last pass whose values are not finite. Padding counts for nothing.

        kept: positions of the `logits [B, len(kept), vocab_size]`.
        """
        lengths = _lengths(runs, logits.device)
        places = torch.arange(_longest(runs), device=logits.device)
        broken = self.watch.broken().view(len(runs), -1) & (places < lengths)
        voiceless = ~logits.amax(dim=-1).isfinite() & (torch.tensor(kept, device=logits.device) < lengths)
        self.watch.forget()
        found: list[int] = (broken.any(dim=1) | voiceless.any(dim=1)).nonzero().flatten().tolist()
        return found

    def _overflow(self, runs: Sequence[TokenRun], number: int, limit: StepLimit) -> TrimtabError:
        """The error of a broken sequence: the model's own, if its text breaks it without interventions too."""
        run = runs[number]
        layer, position, taken = self._located(runs, number, limit)
        program = run.program
        if program is None or not program.acting or not self.is_finite(run.token_ids):
            return model_error(position, self.model.dtype)
        strongest = None if taken is None else taken.strongest(number * _longest(runs), (number + 1) * _longest(runs))
        return fault_error(program, Fault(program.first_acting if strongest is None else strongest, None, layer,
                                          position, math.inf, behind=True))

    def _located(self, runs: Sequence[TokenRun], number: int, limit: StepLimit
                 ) -> tuple[int | None, int, Taken | None]:
        """The first layer and token of a sequence whose activations are not finite, from a pass that keeps all of
        them. Only the logits: no layer, the last token."""
        places: list[tuple[Site, int]] = [("resid_pre", 0), *(("resid_post", n) for n in range(self._last_layer + 1))]
        found: dict[tuple[Site, int], Tensor] = {}
        _, record = self._run(runs, limit, places, found, logits_to_keep=1)
        self.watch.forget()
        length = len(runs[number].token_ids)
        for place in places:
            fine = found[place].view(len(runs), _longest(runs), -1)[number, :length].isfinite().all(dim=-1)
            if not bool(fine.all()):
                return place[1], int((~fine).nonzero()[0]), record.read()
        return None, length - 1, record.read()

    @torch.no_grad()
    def _run(self, runs: Sequence[TokenRun], limit: StepLimit, capture: Sequence[tuple[Site, int]],
             found: dict[tuple[Site, int], Tensor] | None, **kwargs: Any) -> tuple[Any, Record]:
        longest = _longest(runs)
        ids = torch.zeros(len(runs), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        slots = np.zeros((len(runs), longest), dtype=np.int32)
        bits = np.zeros((len(runs), longest), dtype=np.uint32)
        acting = {i: run.program for i, run in enumerate(runs) if run.program is not None and run.program.acting}
        held = dict(zip(acting, self.bank.hold(list(acting.values())), strict=True))
        for i, run in enumerate(runs):
            length = len(run.token_ids)
            ids[i, :length] = torch.tensor(run.token_ids)
            mask[i, :length] = 1
            if i in acting:
                slots[i, :length], bits[i, :length] = held[i], _bits(run, acting[i])
        with ExitStack() as stack:
            plan = self.steerer.plan(slots.ravel(), bits.ravel())
            # After the plan has put its hooks there: what is captured is what steering left.
            for key in capture:
                assert found is not None
                stack.callback(attach(self.model, *key, _keeper(found, key)).remove)
            with self.steerer.acting(plan, limit) as record:
                return self.model(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device),
                                  use_cache=False, **kwargs), record


def compared(steered: LogitsOf, other: LogitsOf, request: CompareRequest) -> Divergence:
    """Divergence of two passes, a block of rows at a time, on the CPU."""
    parts = []
    for start in range(request.prompt_length, len(request.token_ids), ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, len(request.token_ids))
        block = slice(start - request.prompt_length, stop - request.prompt_length)
        ours = steered(block)
        chosen = torch.tensor(request.token_ids[start:stop], device=ours.device)
        parts.append(divergence(ours, other(block), chosen, request.end_ids))
    whole = Divergence.join(parts)
    return Divergence(**{name: value.cpu() for name, value in vars(whole).items()})


def _keeper(found: dict[tuple[Site, int], Tensor], key: tuple[Site, int]) -> Callable[[Tensor], Tensor]:
    def keep(h: Tensor) -> Tensor:
        found[key] = h
        return h

    return keep


def _bits(run: TokenRun, program: Program) -> Any:
    length = len(run.token_ids)
    touch = program.touch(run.token_ids[:run.prompt_length], length - run.prompt_length, run.roles)
    return touch.bits_of(run.token_ids)


def _longest(runs: Sequence[TokenRun]) -> int:
    return max(len(run.token_ids) for run in runs)


def _lengths(runs: Sequence[TokenRun], device: torch.device) -> Tensor:
    """`[B, 1]`."""
    return torch.tensor([len(run.token_ids) for run in runs], device=device).unsqueeze(1)
