"""Prometheus metrics, in a registry of their own. Labels are routes, codes and a bounded set of names, never input."""

import threading
from collections.abc import Callable, Iterable

from prometheus_client import generate_latest

from server.engines.base import Engine
from server.observability.instruments import Counter, Gauge, Histogram, Registry
from steering.programs.program import Applied

MAX_ARTIFACT_LABELS = 200
OTHER = "other"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    def __init__(self) -> None:
        self.registry = Registry()
        r = self.registry
        self._requests = Counter("trimtab_requests", "Requests answered.", ["route", "method", "status"], registry=r)
        self._seconds = Histogram("trimtab_request_seconds", "Time from request to the end of the response.",
                                  ["route"], buckets=SECONDS, registry=r)
        self._refused = Counter("trimtab_refusals", "Errors answered, by code.", ["code"], registry=r)
        self._prompt = Counter("trimtab_prompt_tokens", "Prompt tokens of completions.", registry=r)
        self._generated = Counter("trimtab_generated_tokens", "Tokens generated.", registry=r)
        self._first = Histogram("trimtab_time_to_first_token_seconds", "From start to the first token of a completion.",
                                buckets=SECONDS, registry=r)
        self._each = Histogram("trimtab_time_per_output_token_seconds", "Mean time between tokens of a completion.",
                               buckets=TOKEN_SECONDS, registry=r)
        self._steered = Counter("trimtab_steered_requests", "Requests with at least one intervention applied.",
                                registry=r)
        self._suppressed = Counter("trimtab_suppressed_requests", "Requests whose steering the kill switch held back.",
                                   registry=r)
        self._uses = Counter("trimtab_artifact_uses", f"Interventions by artifact name; {OTHER} beyond "
                             f"{MAX_ARTIFACT_LABELS} names.", ["artifact", "op"], registry=r)
        self._gates = Counter("trimtab_gate_decisions", "Gates decided for a prompt, by what they decided.",
                              ["decision"], registry=r)
        self._engine = Gauge("trimtab_engine", "Gauges of the engine: running, waiting, slots, cache blocks.",
                             ["stat"], registry=r)
        self._ready = Gauge("trimtab_engine_ready", "1 while the engine serves requests.", registry=r)
        self._live = Gauge("trimtab_engine_live", "0 when only a new process helps.", registry=r)
        self._restarts = Counter("trimtab_engine_restarts", "Restarts of the engine, by what was wrong.", ["reason"],
                                 registry=r)
        # There from the start: a series that begins at one shows no rise.
        self._restarts_told = dict.fromkeys(("restarting", "stalled"), 0)
        for reason in self._restarts_told:
            self._restarts.labels(reason)
        self._rendering = threading.Lock()
        self._ended = Counter("trimtab_connections_ended", "Connections the server ended before their time: over the "
                              "limit, no head of a request in time, what was sent left unread, no HTTP.", ["reason"],
                              registry=r)
        self._names: set[str] = set()
        # Called before the registry is read, by parts that set their values only then.
        self.before_reading: list[Callable[[], None]] = []

    def answered(self, route: str, method: str, status: int, elapsed_s: float) -> None:
        known = method if method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS") else OTHER
        self._requests.labels(route, known, str(status)).inc()
        self._seconds.labels(route).observe(elapsed_s)

    def refused(self, code: str) -> None:
        self._refused.labels(code).inc()

    def connection_ended(self, reason: str) -> None:
        self._ended.labels(reason).inc()

    def first_token(self, elapsed_s: float) -> None:
        self._first.observe(elapsed_s)

    def completed(self, num_tokens: int, since_first_s: float) -> None:
        self._generated.inc(num_tokens)
        if num_tokens > 1:
            self._each.observe(since_first_s / (num_tokens - 1))

    def admitted(self, prompt_tokens: int, applied: Iterable[Applied], suppressed: bool) -> None:
        self._prompt.inc(prompt_tokens)
        if suppressed:
            self._suppressed.inc()
        interventions = list(applied)
        if interventions:
            self._steered.inc()
        for item in interventions:
            self._uses.labels(self._bounded(item.artifact), item.op).inc()

    def gates(self, opened: int, shut: int) -> None:
        """Decisions of gates for the prompts of a request."""
        self._gates.labels("open").inc(opened)
        self._gates.labels("shut").inc(shut)

    def refresh(self, engine: Engine) -> None:
        """Take over what the engine counts by itself."""
        with self._rendering:
            for stat, value in engine.stats().items():
                self._engine.labels(stat).set(value)
            condition = engine.condition()
            self._ready.set(condition.ready)
            self._live.set(condition.live)
            for reason, count in engine.restarts().items():
                self._restarts.labels(reason).inc(count - self._restarts_told.get(reason, 0))
                self._restarts_told[reason] = count

    def render(self, engine: Engine) -> bytes:
        self.refresh(engine)
        with self._rendering:
            for set_values in self.before_reading:
                set_values()
            text = generate_latest(self.registry)
        return text + engine.metrics()

    def _bounded(self, ref: str | None) -> str:
        if ref is None:
            return "inline"
        name = ref.partition("@")[0]
        if name not in self._names and len(self._names) >= MAX_ARTIFACT_LABELS:
            return OTHER
        self._names.add(name)
        return name
