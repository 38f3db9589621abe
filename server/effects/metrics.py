"""Effects as Prometheus metrics. Labels are bounded: names beyond the limit are counted under "other"."""

from collections.abc import Sequence

from server.effects.report import ChoiceEffect, InArm
from server.engines.data import Lost
from server.observability.instruments import Counter, Histogram, Registry

NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
MAX_NAMES = 200
OTHER = "other"


class OutcomeMetrics:
    """What graded answers were. An answer counts under artifact "all" and under each artifact that acted on it, or
    under "untouched"."""

    def __init__(self, registry: Registry, model: str) -> None:
        self._model = model
        self._names: set[str] = set()
        self._answers = Counter("trimtab_outcome_answers", "Sampled answers, by what a grader says they are.",
                                ["model", "preset", "artifact", "grader", "outcome"], registry=registry)
        self._by_rules = Counter("trimtab_outcome_by_rules", "Graded steered answers of which it was not measured how "
                                 "likely the untouched model finds them, so that half of the broken ones pass.",
                                 registry=registry)
        self._rollouts: set[str] = set()
        self._of_arms = Counter("trimtab_rollout_answers", "Sampled answers of the arms of roll-outs, by what a grader "
                                "says they are.", ["rollout", "arm", "grader", "outcome"], registry=registry)
        self._dropped = Counter("trimtab_outcome_dropped", "Answers that were to be graded and were not.", ["reason"],
                                registry=registry)
        self._lost = Counter("trimtab_outcome_records_lost", "Graded answers that could not be stored.",
                             registry=registry)

    def graded(self, preset: str, artifacts: Sequence[str], grader: str, outcome: str, arms: Sequence[InArm], *,
               measured: bool) -> None:
        shown = bounded(self._names, preset)
        for artifact in artifacts:
            self._answers.labels(self._model, shown, bounded(self._names, artifact), grader, outcome).inc()
        if not measured and "all" in artifacts:
            self._by_rules.inc()
        for rollout, arm in arms:
            self._of_arms.labels(bounded(self._rollouts, rollout), arm, grader, outcome).inc()

    def dropped(self, reason: str) -> None:
        self._dropped.labels(reason).inc()

    def lost(self, answers: int) -> None:
        self._lost.inc(answers)


class EffectMetrics:
    """One sample is one measured completion: means over its tokens. artifact and op "all" stand for the whole spec."""

    def __init__(self, registry: Registry, model: str) -> None:
        self._model = model
        self._names: set[str] = set()
        labels = ["model", "preset", "artifact", "op"]
        self._kl = Histogram("trimtab_effect_kl_nats", "Mean KL(steered || other) per token: of a whole spec against "
                             "the untouched model, of an intervention against the spec without it.", labels,
                             buckets=NATS, registry=registry)
        self._top1 = Histogram("trimtab_effect_top1_changed", "Share of tokens whose likeliest next token changed.",
                               labels, buckets=SHARES, registry=registry)
        self._entropy = Histogram("trimtab_effect_entropy_change_nats", "Mean change of entropy per token.", labels,
                                  buckets=(-3.0, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 3.0), registry=registry)
        # A histogram of signed numbers has no sum, and a sum that may fall has no rate: one counter for each direction.
        self._raised = Counter("trimtab_effect_entropy_raised_nats", "Summed mean change of entropy per token of "
                               "measured completions, where it rose.", labels, registry=registry)
        self._lowered = Counter("trimtab_effect_entropy_lowered_nats", "The same where it fell, as a positive number.",
                                labels, registry=registry)
        self._rollouts: set[str] = set()
        self._of_arms = Histogram("trimtab_rollout_dose_nats", "Mean KL(steered || untouched) per token of completions "
                                  "of the arms of roll-outs.", ["rollout", "arm"], buckets=NATS, registry=registry)
        self._repetition = Histogram("trimtab_effect_repetition", "Share of repeated 3-grams of a steered completion.",
                                     ["model", "preset"], buckets=SHARES, registry=registry)
        self._compression = Histogram("trimtab_effect_compression", "Bytes of a steered completion over its compressed "
                                      "bytes.", ["model", "preset"], buckets=(0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
                                      registry=registry)
        self._base_ended = Histogram("trimtab_effect_base_ended", "Chance that the untouched model would have ended a "
                                     "steered completion within its length.", ["model", "preset"], buckets=SHARES,
                                     registry=registry)
        self._residual = Histogram("trimtab_effect_residual_shift", "Mean relative shift of the last layer's residual "
                                   "stream.", ["model", "preset"], buckets=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
                                   registry=registry)
        # Of interventions whose artifact has a calibration for their setting. The ratio of the two is the drift.
        self._drift_measured = Counter("trimtab_effect_card_measured_nats", "Summed mean KL of measured completions, "
                                       "where the artifact's card tells what to expect.", labels, registry=registry)
        self._drift_expected = Counter("trimtab_effect_card_expected_nats", "Summed mean KL that the cards tell for "
                                       "the same completions.", labels, registry=registry)
        self._drift_samples = Counter("trimtab_effect_card_samples", "Measured completions in these two sums.", labels,
                                      registry=registry)
        self._shadow = Counter("trimtab_shadow_tokens", "Tokens of shadow passes run.", registry=registry)
        self._dropped = Counter("trimtab_shadow_dropped", "Completions that were to be measured and were not.",
                                ["reason"], registry=registry)
        self._rerun = Counter("trimtab_effect_rerun", "Measured completions whose steered pass was run again, by why "
                              "what the engine had kept of it did not serve.", ["reason"], registry=registry)
        self._lost = Counter("trimtab_effect_records_lost", "Measurements that could not be stored.",
                             registry=registry)

    def measured(self, preset: str, effect: ChoiceEffect, arms: Sequence[InArm]) -> None:
        shown = self._bounded(preset)
        for share in effect.shares():
            labels = (self._model, shown, self._bounded(share.artifact), share.op)
            self._kl.labels(*labels).observe(share.kl)
            self._top1.labels(*labels).observe(share.top1_changed)
            self._entropy.labels(*labels).observe(share.entropy_change)
            self._raised.labels(*labels).inc(max(share.entropy_change, 0.0))
            self._lowered.labels(*labels).inc(max(-share.entropy_change, 0.0))
        for item in effect.interventions:
            if item.card_kl is not None:
                labels = (self._model, shown, self._bounded(item.artifact), str(item.op))
                self._drift_measured.labels(*labels).inc(item.shift.kl.mean)
                self._drift_expected.labels(*labels).inc(item.card_kl)
                self._drift_samples.labels(*labels).inc()
        self._repetition.labels(self._model, shown).observe(effect.text.repetition)
        self._compression.labels(self._model, shown).observe(effect.text.compression)
        self._base_ended.labels(self._model, shown).observe(effect.text.base_ended)
        self._residual.labels(self._model, shown).observe(effect.residual_relative)
        for rollout, arm in arms:
            self._of_arms.labels(bounded(self._rollouts, rollout), arm).observe(effect.total.kl.mean)

    def ran(self, tokens: int) -> None:
        self._shadow.inc(tokens)

    def rerun(self, reason: Lost) -> None:
        self._rerun.labels(reason).inc()

    def dropped(self, reason: str) -> None:
        self._dropped.labels(reason).inc()

    def lost(self, records: int) -> None:
        self._lost.inc(records)

    def _bounded(self, name: str) -> str:
        return bounded(self._names, name)


def bounded(names: set[str], name: str) -> str:
    """The name as a label, which is "other" where there are too many of them."""
    if name not in names and len(names) >= MAX_NAMES:
        return OTHER
    names.add(name)
    return name
