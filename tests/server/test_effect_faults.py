"""Faults of the side channel, over HTTP: requests are answered as ever, the loss is counted and logged."""

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from sqlalchemy import event
from structlog.testing import capture_logs

from server.app import create_app
from server.engines.data import CompareRequest, Comparison
from server.observability.metrics import MAX_ARTIFACT_LABELS, Metrics
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from steering.artifacts.payload import Payload
from steering.divergence import Divergence, ResidualShift
from steering.language.spec import Spec
from steering.programs.program import Applied
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from vectors.artifact import Metadata
from vectors.library import Library

STEERED = {"interventions": [{"op": "add", "layers": [1], "inline": {"vector": [1.0] * 8}}]}
REQUESTS = 12
Logs = list[MutableMapping[str, Any]]


class Measuring(ScriptedEngine):
    """Its comparisons hold a KL of 0.25 per token; `fault` is called with the number of each and may raise."""

    fault: Callable[[int], None] = staticmethod(lambda number: None)
    compared = 0

    async def compare(self, request: CompareRequest) -> Comparison:
        self.compared += 1
        await asyncio.sleep(0)
        self.fault(self.compared)
        count = len(request.token_ids) - request.prompt_length
        row = dict.fromkeys(Divergence.__dataclass_fields__, torch.zeros(count))
        total = Divergence(**{**row, "kl": torch.full((count,), 0.25)})
        ones = torch.ones(count)
        return Comparison(total, (total,) * len(request.program.compiled), ResidualShift(ones, ones), exact=True)


@pytest.fixture
def engine(vocabulary: Vocabulary) -> Measuring:
    return Measuring(vocabulary)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", shadow_sample=1.0, shadow_budget=10.0)


@asynccontextmanager
async def serving(settings: Settings, engine: ScriptedEngine, library: Library, vocabulary: Vocabulary
                  ) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    app = create_app(settings, engine, library, vocabulary, engine_name="scripted")
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://localhost",
                                                                   timeout=60) as client:
        yield client, app.state.server


async def ask(client: httpx.AsyncClient, report: str = "none") -> dict[str, Any]:
    answer = await client.post("/v1/chat/completions", json=chat(steering={**STEERED, "report": report}))
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    assert body["choices"][0]["message"]["content"] == " bad day" and body["steering"]["applied"]
    return body


async def metric(client: httpx.AsyncClient, name: str) -> float:
    found = re.findall(rf"^{re.escape(name)} (\S+)$", (await client.get("/metrics")).text, re.MULTILINE)
    return float(found[0]) if found else 0.0


@pytest.fixture
def logs(_logs: None) -> Iterator[Logs]:
    with capture_logs() as found:
        yield found


def logged(logs: Logs, name: str) -> Logs:
    return [line for line in logs if line["event"] == name]


async def drained(client: httpx.AsyncClient, engine: Measuring, count: int) -> None:
    async with asyncio.timeout(30):
        while engine.compared < count:
            await asyncio.sleep(0)


async def test_database_locked(settings: Settings, engine: Measuring, library: Library, vocabulary: Vocabulary,
                               logs: Logs) -> None:
    async with serving(settings, engine, library, vocabulary) as (client, state):
        await ask(client, "summary")
        assert (await client.get("/v1/effects")).json()["data"]
        holder = sqlite3.connect(settings.data_dir / "effects.db", isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        for _ in range(REQUESTS):
            assert (await ask(client, "summary"))["steering"]["effects"]["status"] == "measured"
        await state.shadow.flush()
        refused = await client.get("/v1/effects")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "effects_unavailable"
        assert (await client.get("/health/ready")).status_code == 200
        holder.execute("ROLLBACK")
        holder.close()
        assert await metric(client, "trimtab_effect_records_lost_total") == 2 * REQUESTS
        lines = logged(logs, "effects_not_stored")
        assert sum(line["records"] for line in lines) == 2 * REQUESTS and "locked" in lines[0]["error"]
        await ask(client, "summary")
        rows = (await client.get("/v1/effects", params={"artifact": "all"})).json()["data"]
        assert rows[0]["completions"] == 2 and rows[0]["kl_mean"] == pytest.approx(0.25)


async def test_disk_full(settings: Settings, engine: Measuring, library: Library, vocabulary: Vocabulary,
                         logs: Logs) -> None:
    async with serving(settings, engine, library, vocabulary) as (client, state):
        await ask(client, "summary")
        await state.shadow.flush()

        @event.listens_for(state.effect_store.beside.engine, "begin")
        def _no_more_pages(connection: Any) -> None:
            # SQLite's own answer to a full disk, without filling one.
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        lost = 0.0
        async with asyncio.timeout(60):
            while not lost:
                for _ in range(REQUESTS):
                    await ask(client, "summary")
                # Rows of one minute come together; presets of their own make one row each.
                for n, unwritten in enumerate(list(state.shadow._unwritten)):
                    state.shadow._unwritten[n] = type(unwritten)(**{**vars(unwritten), "preset": f"p{n}" * 40})
                await state.shadow.flush()
                lost = await metric(client, "trimtab_effect_records_lost_total")
        assert "full" in logged(logs, "effects_not_stored")[0]["error"]
        assert (await client.get("/v1/effects")).status_code == 200


async def test_no_database_at_all(settings: Settings, engine: Measuring, library: Library, vocabulary: Vocabulary
                                  ) -> None:
    broken = settings.model_copy(update={"effects_database_url": "sqlite:////proc/nowhere/effects.db"})
    async with serving(broken, engine, library, vocabulary) as (client, state):
        assert (await ask(client, "summary"))["steering"]["effects"]["status"] == "measured"
        await state.shadow.flush()
        assert await metric(client, "trimtab_effect_records_lost_total") == 2
        assert (await client.get("/v1/effects")).json()["error"]["code"] == "effects_unavailable"


@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), KeyError("gone"), AssertionError(),
                                   OSError(28, "full")])
async def test_shadow_raising_in_the_middle(settings: Settings, engine: Measuring, library: Library,
                                            vocabulary: Vocabulary, logs: Logs,
                                            fault: Exception) -> None:
    def every_other(number: int) -> None:
        if number % 2:
            raise fault

    engine.fault = every_other  # type: ignore[method-assign]
    async with serving(settings, engine, library, vocabulary) as (client, _):
        for _ in range(REQUESTS):
            await ask(client)
        await drained(client, engine, REQUESTS)
        told = [(await ask(client, "tokens"))["steering"]["effects"]["status"] for _ in range(4)]
        assert sorted(told) == ["failed", "failed", "measured", "measured"]
        assert await metric(client, 'trimtab_shadow_dropped_total{reason="failed"}') == REQUESTS / 2 + 2
        measured = await metric(client, 'trimtab_effect_kl_nats_count{artifact="all",model="tiny",op="all",preset=""}')
        assert measured == REQUESTS / 2 + 2
        lines = logged(logs, "shadow_failed")
        assert len(lines) == REQUESTS / 2 + 2 and type(fault).__name__ in lines[0]["error"]


async def test_a_measurement_that_is_not_finite_costs_itself_alone(
        settings: Settings, engine: Measuring, library: Library, vocabulary: Vocabulary, logs: Logs) -> None:
    compare = engine.compare

    async def sometimes(request: CompareRequest) -> Comparison:
        found = await compare(request)
        if engine.compared % 3:
            return found
        return replace(found, total=replace(found.total, kl=torch.full_like(found.total.kl, torch.nan)))

    engine.compare = sometimes  # type: ignore[method-assign]
    async with serving(settings, engine, library, vocabulary) as (client, _):
        told = [(await ask(client, "tokens"))["steering"]["effects"] for _ in range(REQUESTS)]
        assert [effect["status"] for effect in told] == ["measured", "measured", "failed"] * (REQUESTS // 3)
        assert "total.kl.mean" in told[2]["reason"]
        labels = 'artifact="all",model="tiny",op="all",preset=""'
        kept = REQUESTS * 2 // 3
        assert await metric(client, f"trimtab_effect_kl_nats_sum{{{labels}}}") == pytest.approx(0.25 * kept)
        assert await metric(client, f"trimtab_effect_kl_nats_count{{{labels}}}") == kept
        assert await metric(client, 'trimtab_shadow_dropped_total{reason="not_finite"}') == REQUESTS - kept
        rows = (await client.get("/v1/effects", params={"group": "artifact"})).json()["data"]
        assert {(row["artifact"], row["completions"]) for row in rows} == {("all", kept), ("inline", kept)}
        assert len(logged(logs, "effect_not_finite")) == REQUESTS - kept


@pytest.mark.parametrize("group", ["artifact", "preset", "minute", "all"])
async def test_every_grouping_counts_a_completion_once(settings: Settings, engine: Measuring, library: Library,
                                                       vocabulary: Vocabulary, group: str) -> None:
    """16 completions of a preset that uses one artifact twice, and another in two ways."""
    for name in ("one", "two"):
        library.create(Metadata(name=name, kind="vector", op="add", site="resid_post"),
                       Payload.build("vector", {2: {"vector": torch.ones(8)}}))
    library.presets.create("busy", Spec.model_validate({"interventions": [
        {"artifact": "one"}, {"artifact": "one", "strength": 2}, {"artifact": "two"},
        {"artifact": "two", "op": "ablate", "override": ["op"]}]}))
    async with serving(settings, engine, library, vocabulary) as (client, _):
        for _ in range(16):
            answer = await client.post("/v1/chat/completions",
                                       json=chat(steering={"preset": "busy", "report": "summary"}))
            assert answer.json()["steering"]["effects"]["status"] == "measured"
        for query in ({}, {"artifact": "one@1"}, {"artifact": "two@1"}, {"preset": "busy@1"}):
            rows = (await client.get("/v1/effects", params={"group": group, **query})).json()["data"]
            keys = [tuple(row.get(name) for name in ("artifact", "op", "preset")) for row in rows]
            # Minutes may have changed on the way; within one key each completion is there once.
            assert {key: sum(row["completions"] for row, own in zip(rows, keys, strict=True) if own == key)
                    for key in keys} == dict.fromkeys(keys, 16) and rows, query
        name = 'trimtab_effect_kl_nats_count{artifact="one@1",model="tiny",op="add",preset="busy@1"}'
        assert await metric(client, name) == 16


async def test_ten_scrapes_at_once_among_requests(settings: Settings, engine: Measuring, library: Library,
                                                  vocabulary: Vocabulary) -> None:
    async with serving(settings, engine, library, vocabulary) as (client, _):
        async def scrape() -> None:
            for _ in range(20):
                page = await client.get("/metrics")
                assert page.status_code == 200 and page.text.endswith("\n")
                kinds = re.findall(r"^# TYPE (\S+) ", page.text, re.MULTILINE)
                assert len(kinds) == len(set(kinds)) and "trimtab_effect_kl_nats" in kinds

        await asyncio.gather(*(scrape() for _ in range(10)), *(ask(client, "summary") for _ in range(REQUESTS)))
        assert await metric(client, 'trimtab_effect_kl_nats_count{artifact="all",model="tiny",op="all",preset=""}'
                            ) == REQUESTS


def test_ten_thousand_artifact_names_are_bounded_labels() -> None:
    metrics = Metrics()
    for i in range(10_000):
        metrics.admitted(1, [Applied(f"name-{i}@1", "add", ("resid_post",), (0,), {}, {})], suppressed=False)
    series = [sample for family in metrics.registry.collect() if family.name == "trimtab_artifact_uses"
              for sample in family.samples if sample.name.endswith("_total")]
    assert len(series) == MAX_ARTIFACT_LABELS + 1
    assert sum(sample.value for sample in series) == 10_000
