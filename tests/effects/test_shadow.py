"""The side channel: what it keeps, what it drops, and that nothing it does reaches a request."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sqlalchemy.exc import OperationalError

from server.effects.metrics import MAX_NAMES, EffectMetrics
from server.effects.shadow import Finished, Shadow
from server.effects.store import EffectStore, Sample, Which
from server.engines.data import CompareRequest, Comparison
from server.observability.instruments import Registry
from steering.divergence import Divergence, ResidualShift
from steering.language.errors import EngineUnavailable
from steering.language.scope import Scope
from steering.ops.base import Row
from steering.programs.program import Applied, Compiled, Program


def program(*artifacts: str) -> Program:
    return Program(tuple(
        Compiled("add", Scope(), {("resid_post", 0): Row("add", {"delta": torch.ones(2)})},
                 Applied(artifact, "add", ("resid_post",), (0,), {}, {})) for artifact in artifacts))


def finished(*artifacts: str, tokens: int = 10, preset: str = "calm@1") -> Finished:
    return Finished(0, program(*artifacts), [1] * tokens, [2, 3, 4, 5], None, True, preset)


class FakeEngine:
    """KL of 0.2 per token in all, and 0.1 times (i + 1) for intervention i."""

    def __init__(self, error: Exception | None = None, waiting: int = 0) -> None:
        self.error, self.waiting = error, waiting
        self.compared: list[CompareRequest] = []

    def stats(self) -> dict[str, float]:
        return {"waiting": self.waiting}

    async def compare(self, request: CompareRequest) -> Comparison:
        self.compared.append(request)
        if self.error is not None:
            raise self.error
        count = len(request.token_ids) - request.prompt_length

        def one(kl: float) -> Divergence:
            row = {name: torch.ones(count) for name in ("reverse_kl", "entropy", "other_entropy", "top1_agree",
                                                        "surprise", "rank", "end", "other_end")}
            return Divergence(kl=torch.full((count,), kl), **row)

        parts = tuple(one(0.1 * (i + 1)) for i in range(len(request.program.compiled)))
        return Comparison(one(0.2), parts, ResidualShift(torch.ones(count), torch.ones(count)), exact=True)


def make(engine: Any, store: Any = None, **options: float) -> tuple[Shadow, Registry]:
    registry = Registry()
    metrics = EffectMetrics(registry, "lab-dense")

    def decode(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    settings: dict[str, Any] = {"sample": 1.0, "budget": 1.0, **options}
    return Shadow(engine, metrics, store, decode=decode, seed=0, **settings), registry


def value(registry: Registry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0


async def test_measured_completions_reach_response_metrics_and_database(tmp_path: Path) -> None:
    store = EffectStore(f"sqlite:///{tmp_path}/effects.db")
    shadow, registry = make(FakeEngine(), store)
    effects = await shadow.measure([finished("a@1", "b@2")], per_token=True)
    assert effects.status == "measured"
    choice = effects.choices[0]
    assert choice.total.kl.mean == pytest.approx(0.2)
    assert [(i.artifact, round(i.shift.kl.p95, 6)) for i in choice.interventions] == [("a@1", 0.1), ("b@2", 0.2)]
    assert choice.per_token is not None and len(choice.per_token.interventions) == 2
    labels = {"model": "lab-dense", "preset": "calm@1", "artifact": "b@2", "op": "add"}
    assert value(registry, "trimtab_effect_kl_nats_sum", **labels) == pytest.approx(0.2)
    await shadow.flush()
    rows = {(row.artifact, row.preset): row for row in store.totals(group="all")}
    assert set(rows) == {("all", "calm@1"), ("a@1", "calm@1"), ("b@2", "calm@1")}
    assert rows["a@1", "calm@1"].kl_mean == pytest.approx(0.1) and rows["a@1", "calm@1"].tokens == 4


async def test_nothing_applied_is_said() -> None:
    shadow, _ = make(FakeEngine())
    assert (await shadow.measure([], per_token=False)).status == "unsteered"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), EngineUnavailable("gone"), ValueError("bad")])
async def test_a_failing_measurement_is_counted_and_told(error: Exception) -> None:
    shadow, registry = make(FakeEngine(error))
    effects = await shadow.measure([finished("a@1")], per_token=False)
    assert effects.status == "failed" and not effects.choices
    assert value(registry, "trimtab_shadow_dropped_total", reason="failed") == 1


async def test_offered_work_stays_within_the_budget() -> None:
    engine = FakeEngine()
    shadow, registry = make(engine, budget=0.5)
    await shadow.start()
    shadow.served(200)  # earns 100 tokens; each measurement costs 2 passes of 14
    shadow.offer([finished("a@1") for _ in range(10)])
    async with asyncio.timeout(10):
        while value(registry, "trimtab_shadow_tokens_total") < 3 * 28:
            await asyncio.sleep(0)
    await shadow.stop()
    assert len(engine.compared) == 3 and shadow._queue.empty()
    assert value(registry, "trimtab_shadow_dropped_total", reason="budget") == 7
    assert value(registry, "trimtab_shadow_tokens_total") == 3 * 28


async def test_sampling_takes_about_its_share_and_zero_takes_none() -> None:
    for share, low, high in ((0.0, 0, 0), (0.25, 180, 320)):
        shadow, registry = make(FakeEngine(), sample=share)
        shadow.served(10**6)
        for _ in range(1000):
            shadow.offer([finished("a@1")])
        taken = shadow._queue.qsize() + value(registry, "trimtab_shadow_dropped_total", reason="queue")
        assert low <= taken <= high


async def test_waits_for_requests_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.effects.shadow.BUSY_WAIT_S", 0)
    engine = FakeEngine(waiting=3)
    shadow, registry = make(engine)
    shadow.served(1000)
    shadow.offer([finished("a@1")])
    await shadow.start()
    while not value(registry, "trimtab_shadow_dropped_total", reason="busy"):
        await asyncio.sleep(0)
    await shadow.stop()
    assert not engine.compared


@pytest.mark.parametrize("message", ["database is locked", "database or disk is full"])
async def test_a_database_that_fails_costs_records_only(message: str) -> None:
    def write(samples: Sequence[Sample]) -> None:
        raise OperationalError("INSERT", {}, Exception(message))

    shadow, registry = make(FakeEngine(), SimpleNamespace(write=write))
    effects = await shadow.measure([finished("a@1")], per_token=False)
    await shadow.flush()
    assert effects.status == "measured"
    assert value(registry, "trimtab_effect_records_lost_total") == 2


async def test_ten_thousand_names_are_bounded_labels() -> None:
    shadow, registry = make(FakeEngine())
    for i in range(10_000):
        await shadow.measure([finished(f"name-{i}@1", preset="")], per_token=False)
    series = [s for metric in registry.collect() if metric.name == "trimtab_effect_kl_nats" for s in metric.samples
              if s.name.endswith("_count")]
    assert len(series) <= MAX_NAMES + 1
    other = {"model": "lab-dense", "preset": "", "artifact": "other", "op": "add"}
    assert value(registry, "trimtab_effect_kl_nats_count", **other) > MAX_NAMES


def test_totals_group_filter_and_weigh(tmp_path: Path) -> None:
    store = EffectStore(f"sqlite:///{tmp_path}/effects.db")

    def sample(minute: int, artifact: str, kl: float) -> Sample:
        return Sample(minute, artifact, "add", "p@1", 4, kl, 0.0, 0.5, 0.0, 4, 0.5, "default")

    store.write([sample(10, "a@1", 0.1), sample(10, "a@1", 0.3), sample(11, "a@1", 0.8), sample(10, "b@1", 0.2)])
    by_artifact = {row.artifact: row for row in store.totals(group="artifact")}
    assert by_artifact["a@1"].completions == 3
    assert by_artifact["a@1"].kl_mean == pytest.approx(0.4)
    assert [row.minute for row in store.totals(group="minute", which=Which(artifact="a@1"))] == [11, 10]
    assert [row.artifact for row in store.totals(group="artifact", which=Which(since=660))] == ["a@1"]
    found = store.totals(group="artifact", which=Which(until=660, artifact="b@1"))
    assert [row.artifact for row in found] == ["b@1"]
    store.close()


async def test_lengths_are_weighed_against_the_untouched_models_own_ends() -> None:
    """By hand: the untouched model ends with 0.5 at each of four tokens, so it would have ended with 1 - 0.5^4."""
    class Ending(FakeEngine):
        async def compare(self, request: CompareRequest) -> Comparison:
            found = await super().compare(request)
            total = replace(found.total, end=torch.full((4,), 0.1), other_end=torch.full((4,), 0.5))
            return replace(found, total=total)

    engine = Ending()
    shadow, registry = make(engine)
    text = (await shadow.measure([finished("a@1")], per_token=False)).choices[0].text
    assert (text.end_probability, text.base_end_probability) == (pytest.approx(0.1), 0.5)
    assert text.base_ended == pytest.approx(1 - 0.5**4)
    assert value(registry, "trimtab_effect_base_ended_sum", model="lab-dense", preset="calm@1") == pytest.approx(0.9375)


async def test_drift_sets_what_was_measured_beside_what_the_card_tells() -> None:
    carded = finished("a@1", "b@2")
    first = carded.program.compiled[0]
    known = replace(first, applied=replace(first.applied, card_kl=0.05))
    shadow, registry = make(FakeEngine())
    for _ in range(3):
        effects = await shadow.measure([replace(carded, program=Program((known, carded.program.compiled[1])))],
                                       per_token=False)
    assert [item.card_kl for item in effects.choices[0].interventions] == [0.05, None]
    labels = {"model": "lab-dense", "preset": "calm@1", "artifact": "a@1", "op": "add"}
    assert value(registry, "trimtab_effect_card_measured_nats_total", **labels) == pytest.approx(0.3)
    assert value(registry, "trimtab_effect_card_expected_nats_total", **labels) == pytest.approx(0.15)
    assert value(registry, "trimtab_effect_card_expected_nats_total", **{**labels, "artifact": "b@2"}) == 0


async def test_a_database_that_hangs_costs_records_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.effects.shadow.MOST_UNWRITTEN", 10)
    shadow, registry = make(FakeEngine(), SimpleNamespace(write=lambda samples: None))
    for _ in range(20):
        await shadow.measure([finished("a@1")], per_token=False)
    assert len(shadow._unwritten) == 10
    assert value(registry, "trimtab_effect_records_lost_total") == 30


async def test_entropy_has_a_sum_though_it_is_signed() -> None:
    class Signed(FakeEngine):
        async def compare(self, request: CompareRequest) -> Comparison:
            found = await super().compare(request)
            total = replace(found.total, entropy=torch.full((4,), 1.0 + (0.5 if len(self.compared) == 1 else -0.2)))
            return replace(found, total=total, without=(total,))

    shadow, registry = make(Signed())
    for _ in range(2):
        await shadow.measure([finished("a@1")], per_token=False)
    labels = {"model": "lab-dense", "preset": "calm@1", "artifact": "a@1", "op": "add"}
    assert value(registry, "trimtab_effect_entropy_raised_nats_total", **labels) == pytest.approx(0.5)
    assert value(registry, "trimtab_effect_entropy_lowered_nats_total", **labels) == pytest.approx(0.2)


async def test_why_a_steered_pass_was_run_again_is_counted() -> None:
    class Keeping(FakeEngine):
        async def compare(self, request: CompareRequest) -> Comparison:
            return replace(await super().compare(request), rerun=None if len(self.compared) == 1 else "memory")

    shadow, registry = make(Keeping())
    for _ in range(3):
        await shadow.measure([finished("a@1")], per_token=False)
    assert value(registry, "trimtab_effect_rerun_total", reason="memory") == 2


async def test_what_was_drawn_before_it_ran_is_not_drawn_again() -> None:
    shadow, _ = make(FakeEngine(), sample=0.5)
    shadow.served(10**6)
    shadow.offer([replace(finished("a@1"), drawn=False) for _ in range(50)])
    assert shadow._queue.qsize() == 0
    shadow.offer([replace(finished("a@1"), drawn=True) for _ in range(50)])
    assert shadow._queue.qsize() == 50
    assert 20 < sum(shadow.draws() for _ in range(100)) < 80
