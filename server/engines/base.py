"""The contract between the server and an engine."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from server.engines.adapters import Adapter, Adapters
from server.engines.grammar import Grammar
from steering.divergence import Divergence, ResidualShift
from steering.language.errors import EngineUnavailable
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.program import Program

FinishReason = Literal["stop", "length"]
# The log-probability of a token that is impossible, under a grammar for example, as OpenAI's API writes it. JSON has no
# number for minus infinity.
LEAST_LOGPROB = -9999.0
Unready = Literal["starting", "restarting", "stalled", "stopped", "exhausted", "hung"]


@dataclass(frozen=True)
class Condition:
    """How an engine is, for readiness, liveness and refusals.

    ready: requests are served now.
    live: it serves, or will again by itself. False: only a new process helps.
    reason: why it is not ready; None where it is. "starting": never served yet. "restarting": its loop or process died
    and is started again. "stalled": work waits and nothing advances. "stopped": told to. "exhausted": starting it again
    failed too often. "hung": what stalled could not be ended. The last two are not live.
    retry_after_s: when to ask again, where that can be said.
    """

    ready: bool
    live: bool = True
    reason: Unready | None = None
    retry_after_s: float | None = None

    def error(self) -> EngineUnavailable:
        """What a request that comes now is told."""
        said = {"starting": "the engine is starting", "restarting": "the engine is being restarted",
                "stalled": "the engine makes no progress and will be restarted",
                "stopped": "the server stops", "exhausted": "the engine could not be started again",
                "hung": "the engine hangs"}
        fix = "Try again in a while." if self.live else "The server has to be started again."
        return EngineUnavailable(said[self.reason] if self.reason else "the engine does not run", fix=fix,
                                 retry_after_s=self.retry_after_s)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; seed None draws from the engine's own generator.

    logprobs: None for no log-probabilities, else how many alternatives to report beside the chosen token (0 to 20).
    Log-probabilities are those of the model before temperature, truncation and penalties.
    bad_words: sequences of tokens that must not be completed. min_tokens: no token of stop_token_ids comes before so
    many others. allowed_token_ids: there are no other tokens.
    grammar: what the text is held to; only where the engine's features have "structured_outputs". Log-probabilities
    are of what it leaves.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    allowed_token_ids: tuple[int, ...] | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Generation:
    """One completion to generate. `roles` holds one role per prompt token for chat prompts, else None.

    generated_ids: tokens that were generated before, to go on from under another program, say. They count as generated
    for scopes, sampling (seed, penalties) and max_tokens, and are not delivered again. Only for engines with the
    feature "resume".
    cache_salt: cached prefixes are shared only with completions of the same one.
    keep_from: the position from which on the engine keeps what a comparison of the completion needs; None where it is
    not to be compared.
    guest: it is part of a job, and gives way to those that are not (`server.engines.guests`).
    adapter: what is on the model. Set by `Engine.on`.
    """

    request_id: str
    prompt_ids: Sequence[int]
    sampling: Sampling
    program: Program | None = None
    roles: Sequence[str] | None = None
    generated_ids: Sequence[int] = ()
    keep_from: int | None = None
    cache_salt: str | None = None
    guest: bool = False
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Token:
    """One generated token. `finish_reason` is set on the last one.

    An end-of-text token that ends the completion is delivered too, with finish_reason "stop"; the server leaves its
    text out. top_logprobs: (token id, log-probability), most likely first.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Touched:
    """Tokens that one intervention acted on in one completion, as counted by the engine.

    largest_step, mean_step: of the relative steps |h' - h| / |h| that it asked for, over the tokens and layers that ran
    (a prefix that came from the cache did not); None where none was measured. clipped: steps that were shortened to the
    server's limit. They are measured in floating point and say nothing about equality.
    """

    prompt: int
    generation: int
    largest_step: float | None = field(default=None, compare=False)
    mean_step: float | None = field(default=None, compare=False)
    clipped: int = field(default=0, compare=False)


# Why what was kept of a completion does not serve. memory: there was no room for it. incomplete: a part of it is
# missing. apart: it was made in several parts, under a guard or the kill switch. head: the model's head is of a kind
# that cannot be run by itself. absent: nothing was asked to be kept.
Lost = Literal["memory", "incomplete", "apart", "head", "absent"]


class Kept(ABC):
    """What an engine kept of the passes that made a completion, to compare it with other passes later.

    Only the engine that made it can read it. What it holds is freed when nobody refers to it any more.
    """

    @property
    @abstractmethod
    def lost(self) -> Lost | None:
        """Why it does not serve, None where it does as far as is known."""


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

    def cached(self) -> int | None:
        """Tokens of the prompt that came from the cache of prefixes, once the completion is over; None where the engine
        does not tell."""
        return None

    def kept(self) -> Kept | None:
        """What was kept for a comparison, once the completion is over; None where nothing was to be kept."""
        return None


@dataclass(frozen=True)
class Scores:
    """Teacher-forced scores of one sequence of T tokens.

    logprobs[t]: log-probability of token t given those before it, `[T]`, entry 0 is nan.
    full: log-probabilities over the vocabulary at every position, `[T, vocab_size]` (row t predicts token t + 1), if
    asked for.
    top: if asked for, what was likeliest in the place of each token.
    """

    logprobs: torch.Tensor
    full: torch.Tensor | None = None
    top: "Likeliest | None" = None


@dataclass(frozen=True)
class Likeliest:
    """In the place of each of T tokens, given those before it: the k likeliest ones, best first, `[T, k]` ids and
    log-probabilities, and the rank of the token itself, `[T]`, from 1. Row 0 has no meaning."""

    ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor


@dataclass(frozen=True)
class CompareRequest:
    """A finished completion to run again, teacher-forced: tokens from `prompt_length` on were generated.

    end_ids: tokens that end a text, whose probability is to be told.
    kept: what was kept while it was generated under `program`. Where it serves, the steered pass is not run again.
    guest, adapter: as of a Generation.
    """

    token_ids: Sequence[int]
    prompt_length: int
    program: Program
    roles: Sequence[str] | None = None
    end_ids: tuple[int, ...] = ()
    kept: Kept | None = None
    guest: bool = False
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Comparison:
    """What a program did to the next-token distributions of a completion of G generated tokens.

    total: the program against the untouched model. without: the program against itself without intervention i, one
    entry per intervention; for a single one that is the total. exact: full vocabulary, no bound. rerun: why the steered
    pass was run again; None where what had been kept of it served.
    """

    total: Divergence
    without: tuple[Divergence, ...]
    residual: ResidualShift
    exact: bool
    rerun: Lost | None = "absent"


@dataclass(frozen=True)
class CaptureRequest:
    """Activations to read. `positions` are token positions (negative from the end), or None for all of them.

    Tokens from `prompt_length` on count as generated for scopes (default: none do); `roles` are of the prompt part.
    adapter: as of a Generation.
    """

    token_ids: Sequence[int]
    sites: Mapping[Site, Sequence[int]]
    positions: Sequence[int] | None = None
    prompt_length: int | None = None
    roles: Sequence[str] | None = None
    adapter: Adapter | None = None


# site -> layer -> [num_positions, width] float32 on the CPU.
Captured = Mapping[Site, Mapping[int, torch.Tensor]]


class Engine(ABC):
    """A loaded model that generates, scores and captures under programs.

    Values that are not finite stay with the request that made them: it fails with a typed error, and no other request
    changes by a bit. So score, next_logprobs, capture, compare and compare_all raise SteeringOverflow, SteeringLimit
    and ModelOverflow as iterating a completion does, and what they return is finite.

    end_ids: end-of-text tokens of the model's generation config.
    features: what the engine can do beyond the contract, by name; "resume": to go on from `Generation.generated_ids`.
    not_resumed: fields of `Sampling` that a completion which is gone on with cannot have set.
    adapters: those that requests may name; None where the engine takes none.
    """

    facts: ModelFacts
    end_ids: tuple[int, ...] = ()
    features: frozenset[str] = frozenset()
    not_resumed: tuple[str, ...] = ()
    adapters: Adapters | None = None

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
