"""What the server hands to an engine, and what an engine hands back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from server.engines.adapters import Adapter
from server.engines.grammar import Grammar
from steering.divergence import Divergence, ResidualShift
from steering.language.errors import EngineUnavailable
from steering.language.vocabulary import Site
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
class Contrast:
    """A second, weak run beside that of a generation, under another program, to choose tokens by the difference.

    Tokens are chosen by `(1 + beta) strong - beta weak` logits among those whose probability in the strong run is at
    least alpha times its largest, before all that `Sampling` asks for but its grammar and its lists of tokens, which
    come first. Log-probabilities are of these.
    """

    weak: Program | None
    alpha: float
    beta: float


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
    contrast: the weak run beside it. Only for engines with the feature "contrast".
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
    contrast: Contrast | None = None


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
class ScoreRequest:
    """Tokens of which those from `start` on are scored, and count as generated. Where `start` is their number, the
    tokens are a prompt, and what may follow it is scored.

    guest: as of a Generation.
    """

    token_ids: Sequence[int]
    start: int
    program: Program | None = None
    guest: bool = False


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
