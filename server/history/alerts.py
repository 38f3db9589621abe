"""The alert rules of deploy/prometheus/alerts.yml, read from the server's own record, so that no Prometheus is needed.

A rule that holds now is pending, and fires once it has held for its time without a break. Thresholds, windows and
times are those of the file; a test holds the two together.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from server.history.interval import Interval
from server.history.store import MINUTE_S

DRIFT = (0.5, 2.0)
REPETITION = 0.3
REFUSED = 0.02
# Fewer say nothing: one long answer of four is a quarter of them.
LEAST_SAMPLES = 20
LEAST_REQUESTS = 100
# Of what ends a roll-out. A candidate that is no worse gets there by chance in at most 11 % of the roll-outs with one
# rail, which is 0.05 ** 0.75 by Ville's inequality.
CLOSE = 0.75
SPEC_CODES = ("invalid_spec", "artifact_mismatch", "not_calibrated", "unsupported_site", "layer_out_of_range",
              "slots_exhausted", "default_spec_unusable")
FAULTS = ("failed", "not_finite")
LONGEST_MIN = 30 + 10

Severity = Literal["info", "warning", "critical"]
Finding = Mapping[str, float]
"""What a rule holds of (an artifact, a code, ""), and the number that says so."""


@dataclass(frozen=True)
class Rule:
    """find: over an interval of `window_min` minutes. for_min: how long it has to hold. summary: {subject}, {value}."""

    name: str
    severity: Severity
    window_min: int
    for_min: int
    find: Callable[[Interval], Finding]
    summary: str
    action: str


@dataclass(frozen=True)
class Alert:
    """since: start of the minute from which on it has held, seconds since 1970."""

    rule: Rule
    subject: str
    value: float
    state: Literal["pending", "firing"]
    since: int

    @property
    def summary(self) -> str:
        return self.rule.summary.format(subject=self.subject or "none", value=self.value)

    @property
    def action(self) -> str:
        return self.rule.action.format(subject=self.subject)


def _drift(seen: Interval) -> Finding:
    measured, samples = seen.by("card_measured"), seen.by("card_samples")
    ratios = {name: measured.get(name, 0.0) / told for name, told in seen.by("card_expected").items()
              if told > 0 and samples.get(name, 0.0) >= LEAST_SAMPLES}
    return {name: ratio for name, ratio in ratios.items() if not DRIFT[0] <= ratio <= DRIFT[1]}


def _repeats(seen: Interval) -> Finding:
    counts = seen.by("repetition_count")
    shares = {name: total / counts[name] for name, total in seen.by("repetition").items()
              if counts.get(name, 0.0) >= LEAST_SAMPLES}
    return {name: share for name, share in shares.items() if share > REPETITION}


def _refused(seen: Interval) -> Finding:
    asked = sum(seen.by("requests").values())
    enough = asked >= LEAST_REQUESTS
    shares = {code: seen.by("refusals").get(code, 0.0) / asked for code in SPEC_CODES} if enough else {}
    return {code: share for code, share in shares.items() if share > REFUSED}


def _suppressed(seen: Interval) -> Finding:
    return {"": seen.total("suppressed")} if seen.total("suppressed") else {}


def _dropped(seen: Interval) -> Finding:
    found = {reason: seen.by("dropped").get(reason, 0.0) for reason in FAULTS}
    found["not stored"] = seen.total("records_lost")
    return {reason: count for reason, count in found.items() if count > 0}


def _returned(seen: Interval) -> Finding:
    return {"": seen.total("rollout_returns")} if seen.total("rollout_returns") else {}


def _close(seen: Interval) -> Finding:
    samples = seen.levels_by("rollout_least_samples")
    return {name: level.mean for name, level in seen.levels_by("rollout_evidence").items()
            if level.mean > CLOSE and name in samples and samples[name].most >= LEAST_SAMPLES}


def _restarted(seen: Interval) -> Finding:
    return dict(seen.by("restarts"))


def _all_the_time(level: str, value: float) -> Callable[[Interval], Finding]:
    """Whether a level had this value, 0 or 1, whenever it was looked at."""

    def find(seen: Interval) -> Finding:
        found = seen.level(level)
        return {"": found.mean} if found.looks and found.mean == value else {}

    return find


RULES = (
    Rule("TrimtabEffectDrift", "warning", 30, 10, _drift, "{subject} acts {value:.2f} times as strong as its card says",
         "Look at what changed for {subject}, and calibrate it on prompts as they come in now."),
    Rule("TrimtabDegeneration", "warning", 15, 10, _repeats,
         "{value:.0%} of the 3-grams of steered completions repeat (preset {subject})",
         "Lower the strength, or ask for a dose."),
    Rule("TrimtabSpecsRefused", "warning", 10, 10, _refused,
         "{value:.1%} of the completion requests are refused with {subject}",
         "The log names the field; docs/errors.md says what to do."),
    Rule("TrimtabSteeringSuppressed", "warning", 10, 0, _suppressed,
         "The kill switch holds steering back: {value:.0f} requests in 10 minutes",
         "GET /v1/admin/kill-switch says why."),
    Rule("TrimtabKillSwitchNotStored", "critical", 1, 1, _all_the_time("kill_switch_unstored", 1.0),
         "The kill switch is not in the library: other servers and a restart do not know it",
         "GET /v1/admin/kill-switch says what stands in the way; turn the other servers' switches too."),
    Rule("TrimtabEffectsDropped", "info", 15, 5, _dropped,
         "{value:.0f} measurements {subject} in 15 minutes; requests are not affected",
         "The log lines shadow_failed, effect_not_finite and effects_not_stored have the reason."),
    Rule("TrimtabRolloutReturned", "warning", 15, 0, _returned,
         "A guard rail ended {value:.0f} roll-outs in 15 minutes; only their stable versions act",
         "GET /v1/admin/rollouts, or the console's room of roll-outs, says which and why."),
    Rule("TrimtabRolloutGuardClose", "info", 5, 5, _close,
         "The evidence of a guard rail is at {value:.0%} of what ends its roll-out ({subject})",
         "Compare both versions: trimtab effects --group arm. A roll-out is returned by hand, too."),
    Rule("TrimtabEngineRestarted", "warning", 15, 0, _restarted,
         "The engine was started again ({subject}), {value:.0f} times in 15 minutes",
         "The log line engine_died or engine_stalled has the reason; requests of that step got a 503."),
    Rule("TrimtabEngineNotReady", "warning", 1, 2, _all_the_time("ready", 0.0),
         "The engine serves no requests", "GET /health/ready says why."),
    Rule("TrimtabEngineDown", "critical", 1, 0, _all_the_time("live", 0.0),
         "Only a new process helps: the engine hangs, or could not be started again",
         "Start the server again. GET /health/live says which; the log says what it hung in or what failed."),
)


def alerts(rows: Iterable[tuple[int, Interval]], now: int) -> list[Alert]:
    """What holds at `now`, the firing ones first. rows: the minutes of the last `LONGEST_MIN`, the running one too."""
    minutes = list(rows)
    last = now - now % MINUTE_S
    found = [alert for rule in RULES for alert in _of(rule, minutes, last)]
    return sorted(found, key=lambda alert: (alert.state != "firing", alert.since))


def _of(rule: Rule, minutes: list[tuple[int, Interval]], last: int) -> Iterable[Alert]:
    def at(minute: int) -> Finding:
        first = minute - (rule.window_min - 1) * MINUTE_S
        return rule.find(Interval.of(one for start, one in minutes if first <= start <= minute))

    earlier = [at(last - back * MINUTE_S) for back in range(1, rule.for_min + 1)]
    for subject, value in at(last).items():
        held = next((n for n, found in enumerate(earlier) if subject not in found), len(earlier))
        yield Alert(rule, subject, value, "firing" if held == rule.for_min else "pending", last - held * MINUTE_S)
