"""The contract between the server and an engine."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from server.engines.adapters import Adapter, Adapters
from server.engines.data import (
    Captured,
    CaptureRequest,
    CompareRequest,
    Comparison,
    Condition,
    Generation,
    Kept,
    ScoreRequest,
    Scores,
    Token,
    Touched,
    Unready,
)
from steering.models.facts import ModelFacts
from steering.programs.program import Program


class Completion(ABC):
    """A running completion: iterate it for tokens; leaving the iteration early cancels it in the engine."""

    @abstractmethod
    async def admit(self) -> None:
        """Wait until the engine has room for the request's program. Iterating does this too; call it first where an
        error must come before the response has begun.

        Raises:
            SlotsExhausted: no slot came free in time.
            EngineUnavailable: the engine does not run.
        """

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[Token]:
        """
        Raises:
            SteeringOverflow: an intervention made values that are not finite. `param` is `interventions[i]`.
            SteeringLimit: it moves a token by more than the server allows; likewise.
            ModelOverflow: the model itself made such values.
            EngineUnavailable: the engine gave the completion up.
        """

    @abstractmethod
    async def cancel(self) -> None:
        """Stop generating and free what the completion holds. Idempotent."""

    @abstractmethod
    def touched(self) -> list[Touched]:
        """One entry per intervention of the program, counting tokens processed so far, padding and repeats excluded."""

    def weak_touched(self) -> list[Touched]:
        """The same for the program of the weak run, where the generation has a contrast."""
        return []

    def cached(self) -> int | None:
        """Tokens of the prompt that came from the cache of prefixes, once the completion is over; None where the engine
        does not tell."""
        return None

    def kept(self) -> Kept | None:
        """What was kept for a comparison, once the completion is over; None where nothing was to be kept."""
        return None


class Engine(ABC):
    """A loaded model that generates, scores and captures under programs.

    Values that are not finite stay with the request that made them: it fails with a typed error, and no other request
    changes by a bit. So score, next_logprobs, capture, compare and compare_all raise SteeringOverflow, SteeringLimit
    and ModelOverflow as iterating a completion does, and what they return is finite.

    end_ids: end-of-text tokens of the model's generation config.
    features: what the engine can do beyond the contract, by name; "resume": to go on from `Generation.generated_ids`;
        "contrast": a second run beside one, `Generation.contrast`; "batched_scores": many texts under many programs in
        the steps that completions share, `score_all` and `following`, those of guests as guests' steps.
    not_resumed: fields of `Sampling` that a completion which is gone on with cannot have set.
    adapters: those that requests may name; None where the engine takes none.
    cache_dir: where what is found out about the model may be kept for the next start; None for nowhere.
    """

    facts: ModelFacts
    end_ids: tuple[int, ...] = ()
    features: frozenset[str] = frozenset()
    not_resumed: tuple[str, ...] = ()
    adapters: Adapters | None = None
    cache_dir: Path | None = None

    @abstractmethod
    async def start(self) -> None: ...

    @abstractmethod
    async def stop(self) -> None: ...

    @abstractmethod
    def generate(self, generation: Generation) -> Completion:
        """Begin a completion. Must be called on a running event loop.

        Raises:
            InvalidRequest: prompt and max_tokens do not fit, or a scope does not fit the prompt.
            EngineUnavailable: the engine does not run.
        """

    @abstractmethod
    async def score(self, token_ids: Sequence[int], program: Program | None = None, *, prompt_length: int | None = None,
                    roles: Sequence[str] | None = None, full: bool = False, top: int | None = None) -> Scores:
        """Teacher-forced scores. Tokens from `prompt_length` on count as generated for scopes (default: none do).

        Args:
            full: whether the log-probabilities of the whole vocabulary are wanted, which take much memory.
            top: how many of the likeliest tokens are wanted in each place; None: neither them nor ranks.
        """

    async def next_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None = None) -> torch.Tensor:
        """Log-probabilities of the token after each text, `[len(texts), vocab_size]` float32 on the CPU. Engines that
        can run several in one pass do."""
        rows = []
        for text in texts:
            full = (await self.score(text, program, full=True)).full
            if full is None:
                raise RuntimeError("the engine gave no log-probabilities though they were asked for")
            rows.append(full[-1].float().cpu())
        return torch.stack(rows)

    async def score_all(self, requests: Sequence[ScoreRequest]) -> list[torch.Tensor]:
        """Of each text the log-probabilities of its tokens from `start` on, `[len(token_ids) - start]` float32 on the
        CPU. Only for engines with the feature "batched_scores", as the next one."""
        raise NotImplementedError

    async def following(self, requests: Sequence[ScoreRequest]) -> torch.Tensor:
        """Log-probabilities of the token after each text, `[len(requests), vocab_size]` float32 on the CPU."""
        raise NotImplementedError

    @abstractmethod
    async def capture(self, requests: Sequence[CaptureRequest], program: Program | None = None) -> list[Captured]:
        """Activations of every request, in order. With a program: what is read is after its interventions."""

    @abstractmethod
    async def compare(self, request: CompareRequest) -> Comparison:
        """Measure the program of a finished completion, pass by pass, letting generation go first in between."""

    async def compare_all(self, requests: Sequence[CompareRequest]) -> list[Comparison]:
        """`compare` of many completions, in order. Engines that can run several in one pass do."""
        return [await self.compare(request) for request in requests]

    def on(self, adapter: Adapter) -> "Engine":
        """The engine with one of its adapters on the model. Only where there are `adapters`, as the next two."""
        raise NotImplementedError

    async def load_adapter(self, name: str, folder: Path) -> Adapter:
        """Let requests name the adapter in `folder`, in place of one that had the name.

        Raises:
            InvalidAdapter: it cannot be served.
            EngineUnavailable: the engine does not run.
        """
        raise NotImplementedError

    async def unload_adapter(self, name: str) -> None:
        """Let no request name it any more; those that run go on. Raises NotFound."""
        raise NotImplementedError

    @abstractmethod
    def capabilities(self) -> dict[str, Any]:
        """`{"sites": {site: {"layers": [...], "ops": [...]}}, ...}` as proven by the self-test of this start."""

    @abstractmethod
    def stats(self) -> dict[str, float]:
        """Gauges: running, waiting, slots_total, slots_used, kv_blocks_total, kv_blocks_used."""

    def metrics(self) -> bytes:
        """Metrics of the engine's own, in Prometheus' text format, beside the server's."""
        return b""

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens that prompt and completion of one request may have together: the model's context, or less where the
        engine's cache does not hold one."""
        return self.facts.context_length

    @property
    def max_contrast_tokens(self) -> int:
        """The same for a request with a contrast, both of whose runs are in the cache."""
        return self.max_sequence_tokens

    def restarts(self) -> Mapping[Unready, int]:
        """How often the engine was started again since the server began, by what was wrong."""
        return {}

    @abstractmethod
    def condition(self) -> Condition:
        """How the engine is. Takes no lock and no time: readiness is asked while everything else waits."""

    @property
    def alive(self) -> bool:
        """Whether requests can be served."""
        return self.condition().ready
