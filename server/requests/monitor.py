"""Monitors: scores of probes, per token of a completion, without changing anything.

The completion is generated first and then run once more, teacher-forced, under the program it was generated under, to
read what the probes look at. So a monitor cannot move a token; it costs one pass over prompt and completion. The pass
is a side channel: one that fails is said in the response, and the completion stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import structlog
import torch
from pydantic import BaseModel, Field

from server.engines.base import Engine
from server.engines.data import Captured, CaptureRequest
from server.engines.parts import Part, spans
from server.observability.instruments import Counter, Gauge, Registry
from steering.language.errors import TrimtabError
from steering.language.finite import not_finite
from steering.language.gates import Reading
from steering.language.vocabulary import Direction, Form, Site
from steering.programs.program import Program
from steering.programs.reading import Reader

log = structlog.get_logger("trimtab.monitor")
MAX_NAMES = 200
OTHER = "other"
# The average forgets half of what it knows within this many tokens.
HALF_LIFE_TOKENS = 1000


@dataclass(frozen=True)
class Monitor:
    """What to read, and what it records about the score that parts its classes.

    trend: over how many tokens to tell of the scores' trend. label: of its metrics.
    """

    reader: Reader
    threshold: float | None
    direction: Direction
    trend: int | None = None
    label: str = ""

    @classmethod
    def of(cls, reader: Reader, recorded: Reading | None, *, form: Form | None = None, trend: int | None = None
           ) -> "Monitor":
        """form: that was asked for, if any. A recorded threshold belongs to the form that it was found for."""
        own = recorded if recorded is not None and recorded.form == reader.form else None
        threshold = reader.recorded()
        if threshold is None and own is not None:
            threshold = own.threshold
        name = reader.ref.partition("@")[0]
        if reader.feature is not None:
            name = f"{name}[{reader.feature}]"
        label = name if form is None or own is not None else f"{name}:{form}"
        return cls(reader, threshold, "above" if own is None else own.direction, trend, label)

    def beyond(self, score: float, threshold: float) -> bool:
        """Whether a score lies on the side on which the concept does. NaN does."""
        return not (score <= threshold if self.direction == "above" else score >= threshold)


@dataclass(frozen=True)
class Limit:
    """What a guard reads, and the mean score that the tokens of a check must not be beyond."""

    monitor: Monitor
    threshold: float


@dataclass(frozen=True)
class Watched:
    """One finished choice. parts: of a guarded one, the programs it was made under."""

    index: int
    program: Program | None
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    roles: Sequence[str] | None
    parts: Sequence[Part] = ()


class MonitorChoice(BaseModel):
    """Scores of one choice: layer to one number per token."""

    index: int
    prompt: dict[str, list[float | None]] = Field(description="Null where the form looks at a window of tokens that is "
                                                  "not full yet.")
    generation: dict[str, list[float | None]] = Field(description="Of every generated token, read as it was fed back; "
                                                      "the last one as it would have been.")
    trend: dict[str, list[float | None]] = Field(default={}, description="Of every generated token, where a trend was "
                                                 "asked for: Kendall's tau of the scores up to it. Null before there "
                                                 "are enough of them.")


class MonitorReport(BaseModel):
    """What one probe read."""

    probe: str = Field(description="Reference with version.")
    feature: int | None = Field(default=None, description="Which feature, of an SAE.")
    site: Site
    layers: list[int]
    form: Form
    threshold: float | None = Field(description="That the probe records, if any.")
    direction: Direction
    status: Literal["read", "failed"]
    reason: str | None = None
    choices: list[MonitorChoice] = []


class MonitorMetrics:
    """Labels are bounded: names of probes beyond the limit are counted under "other". A feature of an SAE has its index
    behind the name, "scope[712]"."""

    def __init__(self, registry: Registry) -> None:
        self._names: set[str] = set()
        self._means: dict[tuple[str, str], float] = {}
        labels = ["probe", "part"]
        self._score = Gauge("trimtab_monitor_score", "Mean score per token, of the first layer read; forgets half in "
                            f"{HALF_LIFE_TOKENS} tokens. part: prompt or generation.", labels, registry=registry)
        self._tokens = Counter("trimtab_monitor_tokens", "Tokens read.", labels, registry=registry)
        self._over = Counter("trimtab_monitor_tokens_met", "Tokens on the side of the probe's threshold on which its "
                             "concept lies.", labels, registry=registry)
        self._failed = Counter("trimtab_monitor_failed", "Completions whose monitors could not be read.",
                               registry=registry)

    def read(self, monitor: Monitor, choice: MonitorChoice) -> None:
        name = monitor.label or monitor.reader.ref.partition("@")[0]
        if name not in self._names and len(self._names) >= MAX_NAMES:
            name = OTHER
        self._names.add(name)
        layer = str(next(iter(monitor.reader.layers)))
        prompt = choice.prompt[layer]
        # The first position is a sink in many models: its score would drown those of the prompt's text.
        for part, given in (("prompt", prompt[1:] or prompt), ("generation", choice.generation[layer])):
            scores = [score for score in given if score is not None]
            if not scores:
                continue
            mean, kept = sum(scores) / len(scores), 0.5 ** (len(scores) / HALF_LIFE_TOKENS)
            before = self._means.get((name, part), mean)
            self._means[name, part] = kept * before + (1 - kept) * mean
            self._score.labels(name, part).set(self._means[name, part])
            self._tokens.labels(name, part).inc(len(scores))
            if monitor.threshold is not None:
                self._over.labels(name, part).inc(sum(monitor.beyond(s, monitor.threshold) for s in scores))

    def failed(self) -> None:
        self._failed.inc()


async def watch(monitors: Sequence[Monitor], choices: Sequence[Watched], engine: Engine, metrics: MonitorMetrics
                ) -> list[MonitorReport]:
    """The scores of every monitor on every choice. Never raises for a pass that fails."""
    if not monitors:
        return []
    try:
        captured = await _captured(monitors, choices, engine)
    except (TrimtabError, RuntimeError, ValueError, OSError) as error:
        # RuntimeError: what torch raises, out of memory included.
        metrics.failed()
        log.warning("monitor_failed", error=f"{type(error).__name__}: {error}"[:300])
        reason = "the pass that reads them failed; the server's log says why"
        return [_report(monitor, "failed", [], reason) for monitor in monitors]
    reports = []
    for monitor in monitors:
        found = [_scores(monitor, choice, captured[choice.index]) for choice in choices]
        if any(not_finite([choice.model_dump() for choice in found])):
            # A NaN would never leave the moving average.
            metrics.failed()
            log.warning("monitor_not_finite", probe=monitor.reader.ref)
            reports.append(_report(monitor, "failed", [], "it read values that are not finite"))
            continue
        for choice in found:
            metrics.read(monitor, choice)
        reports.append(_report(monitor, "read", found))
    return reports


async def _captured(monitors: Sequence[Monitor], choices: Sequence[Watched], engine: Engine) -> dict[int, Captured]:
    """By index of the choice. Choices under one program are read together."""
    sites: dict[Site, set[int]] = {}
    for monitor in monitors:
        sites.setdefault(monitor.reader.site, set()).update(monitor.reader.layers)
    wanted = {site: sorted(layers) for site, layers in sites.items()}
    groups: dict[int, list[Watched]] = {}
    found: dict[int, Captured] = {}
    for choice in choices:
        if len(choice.parts) > 1:
            found[choice.index] = await _in_parts(choice, wanted, engine)
        else:
            groups.setdefault(id(choice.program), []).append(choice)
    for group in groups.values():
        requests = [CaptureRequest([*c.prompt_ids, *c.generated_ids], wanted, prompt_length=len(c.prompt_ids),
                                   roles=c.roles) for c in group]
        for choice, captured in zip(group, await engine.capture(requests, group[0].program), strict=True):
            found[choice.index] = captured
    return found


async def _in_parts(choice: Watched, sites: dict[Site, list[int]], engine: Engine) -> Captured:
    """Each part read under its own program, the prompt under the first."""
    length, ids = len(choice.prompt_ids), [*choice.prompt_ids, *choice.generated_ids]
    pieces = []
    for part, stop in spans(choice.parts, len(choice.generated_ids)):
        positions = range(length + part.start if part.start else 0, length + stop)
        request = CaptureRequest(ids[:length + stop], sites, positions, prompt_length=length, roles=choice.roles)
        pieces += await engine.capture([request], part.program)
    return {site: {layer: torch.cat([piece[site][layer] for piece in pieces]) for layer in layers}
            for site, layers in sites.items()}


def _scores(monitor: Monitor, choice: Watched, captured: Captured) -> MonitorChoice:
    reader, length = monitor.reader, len(choice.prompt_ids)
    scores = {layer: reader.scores(layer, captured[reader.site][layer]) for layer in reader.layers}
    told = {str(layer): [None] * (at := min(reader.first_scored(layer), len(s))) + s[at:].tolist()
            for layer, s in scores.items()}
    trends = {} if monitor.trend is None else {
        str(layer): kendall(s[reader.first_scored(layer):], monitor.trend) for layer, s in scores.items()}
    return MonitorChoice(index=choice.index, prompt={layer: s[:length] for layer, s in told.items()},
                         generation={layer: s[length:] for layer, s in told.items()},
                         trend={layer: ([None] * (len(told[layer]) - len(s)) + s)[length:]
                                for layer, s in trends.items()})


def kendall(scores: torch.Tensor, window: int) -> list[float | None]:
    """Kendall's tau-a of `scores [T]` against time, over the `window` scores that end with each; None before those."""
    if len(scores) < window:
        return [None] * len(scores)
    seen = scores.unfold(0, window, 1)
    later = torch.triu(torch.ones(window, window, dtype=torch.bool), diagonal=1)
    found = torch.empty(len(seen))
    # As many pairs at a time as stay small beside the activations.
    step = max(2**20 // (window * window), 1)
    for start in range(0, len(seen), step):
        part = seen[start:start + step]
        found[start:start + step] = (part[:, None, :] - part[:, :, None]).sign()[:, later].mean(dim=-1)
    return [None] * (window - 1) + found.tolist()


def _report(monitor: Monitor, status: Literal["read", "failed"], choices: list[MonitorChoice],
            reason: str | None = None) -> MonitorReport:
    reader = monitor.reader
    return MonitorReport(
        probe=reader.ref, feature=reader.feature, site=reader.site, layers=list(reader.layers), form=reader.form,
        threshold=monitor.threshold, direction=monitor.direction, status=status, choices=choices, reason=reason)
