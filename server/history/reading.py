"""What of the server's metrics is kept over time, and how two readings of them become an interval."""

from collections.abc import Mapping
from typing import NamedTuple

from server.history.interval import Interval, Level, Spread
from server.observability.instruments import Registry


class Part(NamedTuple):
    """A counter, or a level, that is kept by some of its labels."""

    name: str
    labels: tuple[str, ...]


SUMS = {
    "trimtab_prompt_tokens_total": "prompt_tokens",
    "trimtab_generated_tokens_total": "generated_tokens",
    "trimtab_steered_requests_total": "steered",
    "trimtab_suppressed_requests_total": "suppressed",
    "trimtab_guard_checks_total": "guard_checks",
    "trimtab_effect_records_lost_total": "records_lost",
    "trimtab_rollout_returns_total": "rollout_returns",
}
PARTS = {
    "trimtab_requests_total": Part("requests", ("route", "status")),
    "trimtab_refusals_total": Part("refusals", ("code",)),
    "trimtab_shadow_dropped_total": Part("dropped", ("reason",)),
    "trimtab_guard_breaches_total": Part("guard_breaches", ("reason", "action")),
    "trimtab_gate_decisions_total": Part("gates", ("decision",)),
    "trimtab_engine_restarts_total": Part("restarts", ("reason",)),
    "trimtab_artifact_uses_total": Part("uses", ("artifact",)),
    "trimtab_effect_card_measured_nats_total": Part("card_measured", ("artifact",)),
    "trimtab_effect_card_expected_nats_total": Part("card_expected", ("artifact",)),
    "trimtab_effect_card_samples_total": Part("card_samples", ("artifact",)),
    "trimtab_effect_repetition_sum": Part("repetition", ("preset",)),
    "trimtab_effect_repetition_count": Part("repetition_count", ("preset",)),
}
SPREADS = {
    "trimtab_request_seconds": "request",
    "trimtab_time_to_first_token_seconds": "first_token",
    "trimtab_time_per_output_token_seconds": "between_tokens",
    "trimtab_queue_seconds": "queue",
}
LEVELS = {
    "trimtab_queue_requests": "queued",
    "trimtab_kill_switch_unstored": "kill_switch_unstored",
}
LEVELS_BY = {
    "trimtab_rollout_evidence": Part("rollout_evidence", ("rollout", "rail")),
    "trimtab_rollout_least_samples": Part("rollout_least_samples", ("rollout", "rail")),
}
# Routes whose requests ask the model for text. Others are not traffic, and their number is no news.
ASKING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_BUCKET, _SUM = "_bucket", "_sum"
_NAMES = [*SUMS, *PARTS, *(name + end for name in SPREADS for end in (_BUCKET, _SUM)), *LEVELS, *LEVELS_BY]

Reading = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by series: its name and its labels."""


def read(registry: Registry) -> Reading:
    """The series that are kept, as they stand."""
    return {(sample.name, tuple(sample.labels.items())): sample.value
            for family in registry.restricted_registry(_NAMES).collect() for sample in family.samples}


def between(before: Reading, after: Reading, engine: Mapping[str, float]) -> Interval:
    """What was counted from one reading to the next, and the levels as they are now, those of the engine too."""
    found = Interval()
    for series, value in after.items():
        name, pairs = series
        grown = value - before.get(series, 0.0)
        labels = dict(pairs)
        if name in LEVELS:
            found.levels[LEVELS[name]] = Level(value, 1, value)
        elif name in LEVELS_BY:
            found.levels[f"{LEVELS_BY[name].name} {_label(LEVELS_BY[name], labels)}"] = Level(value, 1, value)
        elif grown <= 0 or labels.get("route", ASKING[0]) not in ASKING:
            continue
        elif name in SUMS:
            found.sums[SUMS[name]] = grown
        elif name in PARTS:
            own = found.parts.setdefault(PARTS[name].name, {})
            label = _label(PARTS[name], labels)
            own[label] = own.get(label, 0.0) + grown
        else:
            _spread(found, name, labels, grown)
    for stat, value in engine.items():
        found.levels[stat] = Level(value, 1, value)
    for spread in found.spreads.values():
        spread.counts = _apart(spread.counts)
    return found


def _label(part: Part, labels: Mapping[str, str]) -> str:
    if part.name == "requests":
        return f"{labels['status'][0]}xx"
    return " ".join(labels[name] for name in part.labels)


def _spread(found: Interval, name: str, labels: Mapping[str, str], grown: float) -> None:
    from_bucket = name.endswith(_BUCKET)
    spread = found.spreads.setdefault(SPREADS[name.removesuffix(_BUCKET if from_bucket else _SUM)], Spread())
    if not from_bucket:
        spread.total += grown
        return
    bound = float(labels["le"])
    spread.counts[bound] = spread.counts.get(bound, 0.0) + grown


def _apart(cumulative: Mapping[float, float]) -> dict[float, float]:
    """Counts of each bucket, from those of all up to its bound."""
    found, before = {}, 0.0
    for bound in sorted(cumulative):
        if cumulative[bound] > before:
            found[bound] = cumulative[bound] - before
        before = max(before, cumulative[bound])
    return found
