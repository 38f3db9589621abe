"""The server's own record of what it counted: in buckets, as it happens, and as alerts."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from fastapi import FastAPI
from sqlalchemy import create_engine, inspect

from server.history.alerts import (
    CLOSE,
    DRIFT,
    FAULTS,
    LEAST_REQUESTS,
    LEAST_SAMPLES,
    REFUSED,
    REPETITION,
    RULES,
    SPEC_CODES,
    Rule,
    alerts,
)
from server.history.history import MOST_FOLLOWERS
from server.history.interval import Interval, Level, Spread, buckets
from server.history.reading import between
from server.history.store import HOUR_S, MIGRATIONS, MINUTE_S, MINUTES_KEPT_S, Base, HistoryStore
from server.http.runner import Server
from server.settings import Settings
from tests.server.conftest import MODEL, chat
from vectors.library.database import alembic_config, migrate

ALERTS = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yml"
STEERED = {"interventions": [{"op": "add", "layers": [1], "inline": {"vector": [1.0] * 8}}]}
NOW = 1_000_000 * HOUR_S


def counted(**sums: float) -> Interval:
    return Interval(sums=dict(sums))


async def test_what_was_asked_is_in_the_history_at_once_and_after_a_restart(client: httpx.AsyncClient, app: FastAPI
                                                                            ) -> None:
    for _ in range(3):
        assert (await client.post("/v1/chat/completions", json=chat(steering=STEERED))).status_code == 200
    assert (await client.post("/v1/completions", json={"model": MODEL, "prompt": "hi", "max_tokens": 2, "steering": {
        "interventions": [{"artifact": "missing"}]}})).status_code == 404
    # Neither asks the model for anything.
    await client.get("/v1/models")
    answer = (await client.get("/v1/history")).json()
    total = answer["total"]
    assert total["requests"] == {"2xx": 3, "4xx": 1}
    assert (total["steered"], total["refusals"], total["uses"]) == (3, {"not_found": 1}, {"inline": 3})
    assert total["first_token"]["count"] == 3 and 0 <= total["first_token"]["p50"] <= total["first_token"]["p95"]
    assert total["generated_tokens"] > 0 and total["slots_total"] == 4
    assert answer["bucket_s"] == MINUTE_S and answer["since"] % MINUTE_S == 0

    store = HistoryStore(app.state.server.settings.history_url, kept_s=HOUR_S)
    record = app.state.server.history
    await record.stop()
    rows = store.read(0, 2**40)
    store.close()
    assert Interval.of(one for _, one in rows).by("requests") == {"2xx": 3.0, "4xx": 1.0}


async def test_the_history_refuses_what_would_be_too_much(client: httpx.AsyncClient) -> None:
    for query, param in (({"since": 0, "until": 10**6, "bucket_s": 60}, "bucket_s"),
                         ({"since": 9, "until": 9}, "since"), ({"bucket_s": 61}, "bucket_s"), ({"since": -1}, "since")):
        answer = await client.get("/v1/history", params=query)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), query
    wide = (await client.get("/v1/history", params={"since": 0})).json()
    assert wide["bucket_s"] * 240 >= wide["until"] - MINUTE_S and wide["bucket_s"] % MINUTE_S == 0


async def test_a_database_that_is_gone_costs_the_charts_alone(settings: Settings, app: FastAPI,
                                                              client: httpx.AsyncClient) -> None:
    path = settings.data_dir / "history.db"
    path.unlink(missing_ok=True)
    path.mkdir()
    answer = await client.get("/v1/history")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "history_unavailable")
    assert (await client.post("/v1/chat/completions", json=chat())).status_code == 200
    await app.state.server.history._write(60, counted(steered=1))
    assert "trimtab_history_minutes_lost_total 1.0" in (await client.get("/metrics")).text


async def test_live_tells_what_is_counted_as_it_happens(server: Server, address: str, monkeypatch: pytest.MonkeyPatch
                                                        ) -> None:
    monkeypatch.setattr("server.history.history.SAMPLE_S", 0.05)
    async with httpx.AsyncClient(base_url=address, timeout=60) as client, client.stream("GET", "/v1/live") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        steered, asked = 0, False
        async for line in events.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert event["at"] > 0
            steered += event["steered"]
            if not asked:
                asked = True
                assert (await client.post("/v1/chat/completions", json=chat(steering=STEERED))).status_code == 200
            if steered:
                break
        assert steered == 1
        # A page of the history in between takes nothing away from those who follow.
        await client.get("/v1/history")


async def test_followers_are_bounded_and_end_with_the_server(server: Server, address: str, app: FastAPI) -> None:
    record = app.state.server.history
    record._followers = MOST_FOLLOWERS
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        refused = await client.get("/v1/live")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        record._followers = 0
        async with client.stream("GET", "/v1/live") as events:
            lines = events.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            server.stop()
            async with asyncio.timeout(30):
                rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
    assert record._followers == 0


def test_two_readings_become_what_lies_between_them() -> None:
    bucket = "trimtab_time_to_first_token_seconds_bucket"
    before = {("trimtab_generated_tokens_total", ()): 5.0, (bucket, (("le", "0.1"),)): 1.0,
              (bucket, (("le", "1.0"),)): 1.0, (bucket, (("le", "+Inf"),)): 1.0}
    after = {("trimtab_generated_tokens_total", ()): 9.0, (bucket, (("le", "0.1"),)): 2.0,
             (bucket, (("le", "1.0"),)): 3.0, (bucket, (("le", "+Inf"),)): 4.0,
             ("trimtab_requests_total", (("route", "/v1/models"), ("status", "200"))): 7.0,
             ("trimtab_requests_total", (("route", "/v1/completions"), ("status", "400"))): 2.0,
             ("trimtab_rollout_evidence", (("rollout", "ro-1"), ("rail", "dose"))): -0.5,
             ("trimtab_rollout_evidence", (("rollout", "ro-2"), ("rail", "dose"))): 0.5}
    found = between(before, after, {"running": 2.0})
    assert found.sums == {"generated_tokens": 4.0} and found.parts == {"requests": {"4xx": 2.0}}
    assert found.spread("first_token").counts == {0.1: 1.0, 1.0: 1.0, float("inf"): 1.0}
    assert found.level("running") == Level(2.0, 1, 2.0)
    assert found.levels_by("rollout_evidence") == {"ro-1 dose": Level(-0.5, 1, -0.5), "ro-2 dose": Level(0.5, 1, 0.5)}
    assert Interval.from_json(found.to_json()) == found


def test_quantiles_are_those_of_the_bucket_they_lie_in() -> None:
    spread = Spread(3.0, {0.1: 2.0, 0.5: 2.0, float("inf"): 1.0})
    assert spread.quantile(0.5) == pytest.approx(0.1 + 0.4 * 0.25)
    assert spread.quantile(0.99) == 0.5 and spread.mean == pytest.approx(0.6)
    assert Spread().quantile(0.5) is None and Spread().mean is None


def test_minutes_of_servers_add_up_and_old_ones_become_hours(tmp_path: Path) -> None:
    store = HistoryStore(f"sqlite:///{tmp_path}/history.db", kept_s=10 * MINUTES_KEPT_S)
    old = NOW - MINUTES_KEPT_S - HOUR_S
    for start, tokens in ((old, 1), (old + 60, 2), (old + 60, 4), (NOW - 60, 8), (NOW - 11 * MINUTES_KEPT_S, 16)):
        store.write(start, counted(generated_tokens=tokens))
    store.tidy(NOW)
    store.tidy(NOW)
    rows = store.read(0, NOW)
    store.close()
    assert [(start, one.total("generated_tokens")) for start, one in rows] == [(old, 7.0), (NOW - 60, 8.0)]
    assert {start: one.total("generated_tokens") for start, one in buckets(rows, HOUR_S).items()} == {
        old: 7.0, NOW - HOUR_S: 8.0}


def test_migrations_lead_to_exactly_the_tables_of_the_code(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/history.db")
    with engine.begin() as connection:
        migrate(connection, MIGRATIONS)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    with engine.begin() as connection:
        command.downgrade(alembic_config(connection, MIGRATIONS), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]


def ratio(measured: float) -> Interval:
    return Interval(parts={"card_expected": {"a@1": 1.0}, "card_measured": {"a@1": measured},
                           "card_samples": {"a@1": float(LEAST_SAMPLES)}})


def rail(evidence: float, samples: int) -> Interval:
    return Interval(levels={"rollout_evidence ro-1 refusals": Level(2 * evidence, 2, evidence),
                            "rollout_least_samples ro-1 refusals": Level(2.0 * samples, 2, float(samples))})


FIRING: dict[str, Callable[[], Interval]] = {
    "TrimtabEffectDrift": lambda: ratio(3.0),
    "TrimtabDegeneration": lambda: Interval(parts={"repetition": {"p": 9.0}, "repetition_count": {"p": 20.0}}),
    "TrimtabSpecsRefused": lambda: Interval(parts={"requests": {"2xx": 90.0, "4xx": 10.0},
                                                   "refusals": {"invalid_spec": 10.0}}),
    "TrimtabSteeringSuppressed": lambda: counted(suppressed=1),
    "TrimtabKillSwitchNotStored": lambda: Interval(levels={"kill_switch_unstored": Level(2.0, 2, 1.0)}),
    "TrimtabEffectsDropped": lambda: Interval(parts={"dropped": {"failed": 1.0, "budget": 9.0}}),
    "TrimtabRolloutReturned": lambda: counted(rollout_returns=1),
    "TrimtabRolloutGuardClose": lambda: rail(0.8, LEAST_SAMPLES),
    "TrimtabEngineRestarted": lambda: Interval(parts={"restarts": {"stalled": 1.0}}),
    "TrimtabEngineNotReady": lambda: Interval(levels={"ready": Level(0.0, 3, 0.0)}),
    "TrimtabEngineDown": lambda: Interval(levels={"live": Level(0.0, 3, 0.0)}),
}
QUIET = Interval.of([
    ratio(1.1), rail(0.7, 100), counted(steered=4),
    Interval(parts={"requests": {"2xx": 100.0}, "refusals": {"invalid_spec": 1.0}, "dropped": {"budget": 5.0},
                    "repetition": {"p": 0.1}, "repetition_count": {"p": 1.0}}),
    Interval(levels={"ready": Level(3.0, 3, 1.0), "live": Level(3.0, 3, 1.0), "kill_switch_unstored": Level(0.0, 3)})])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_is_pending_until_it_has_held_for_its_time(rule: Rule) -> None:
    name, held = rule.name, rule.for_min
    for minutes, state in ((held + 1, "firing"), (held, "pending")):
        if not minutes:
            continue
        rows = [(NOW - back * MINUTE_S, FIRING[name]()) for back in range(minutes)]
        [found] = [one for one in alerts(rows, NOW + 59) if one.rule.name == name]
        assert (found.state, found.since) == (state, NOW - (minutes - 1) * MINUTE_S)
        assert "{" not in found.summary + found.action
    assert alerts([(NOW - back * MINUTE_S, QUIET) for back in range(40)], NOW) == []


def test_the_rules_are_those_that_prometheus_has() -> None:
    told = {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    assert set(told) == {rule.name for rule in RULES} == set(FIRING)
    for rule in RULES:
        other = told[rule.name]
        assert other["labels"]["severity"] == rule.severity, rule.name
        assert other.get("for", "0m") == f"{rule.for_min}m", rule.name
        if "[" in other["expr"]:
            assert f"[{rule.window_min}m]" in other["expr"], rule.name
    bounds = {name: [float(bound) for bound in re.findall(r"[<>] ([0-9.]+)", rule["expr"])]
              for name, rule in told.items()}
    assert sorted(bounds["TrimtabEffectDrift"]) == list(DRIFT)
    assert bounds["TrimtabDegeneration"] == [REPETITION] and bounds["TrimtabSpecsRefused"] == [REFUSED]
    assert bounds["TrimtabRolloutGuardClose"] == [CLOSE]
    least = {name: [int(bound) for bound in re.findall(r">= ([0-9]+)", rule["expr"])] for name, rule in told.items()}
    assert {name: found for name, found in least.items() if found} == {
        "TrimtabEffectDrift": [LEAST_SAMPLES], "TrimtabDegeneration": [LEAST_SAMPLES],
        "TrimtabSpecsRefused": [LEAST_REQUESTS], "TrimtabRolloutGuardClose": [LEAST_SAMPLES]}
    assert f'"{"|".join(SPEC_CODES)}"' in told["TrimtabSpecsRefused"]["expr"]
    assert f'"{"|".join(FAULTS)}"' in told["TrimtabEffectsDropped"]["expr"]


@pytest.mark.parametrize("few", [
    Interval(parts={"card_expected": {"a@1": 1.0}, "card_measured": {"a@1": 3.0}, "card_samples": {"a@1": 0.4}}),
    Interval(parts={"repetition": {"p": 0.9}, "repetition_count": {"p": 1.0}}), rail(0.9, 4),
    Interval(parts={"requests": {"4xx": 4.0}, "refusals": {"invalid_spec": 4.0}})])
def test_four_completions_say_nothing(few: Interval) -> None:
    """The same shares that fire with enough of them, over a window of the rule."""
    assert alerts([(NOW - back * MINUTE_S, few) for back in range(20)], NOW) == []


async def test_alerts_over_http_name_what_to_do(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/alerts")).json() == {"data": []}
    await client.put("/v1/admin/kill-switch", json={"on": True})
    await client.post("/v1/chat/completions", json=chat(steering=STEERED))
    [alert] = (await client.get("/v1/alerts")).json()["data"]
    assert (alert["name"], alert["state"], alert["value"]) == ("TrimtabSteeringSuppressed", "firing", 1.0)
    assert "kill-switch" in alert["action"]


async def test_the_newest_receipts_are_listed_without_their_texts(client: httpx.AsyncClient) -> None:
    ids = []
    for steering in (STEERED, None):
        body = chat() if steering is None else chat(steering=steering)
        ids.append((await client.post("/v1/chat/completions", json=body)).headers["X-Trimtab-Request"])
    listed = (await client.get("/v1/receipts")).json()["data"]
    assert [one["id"] for one in listed] == ids[::-1]
    assert [one["applied"] for one in listed] == [[], ["inline"]] and listed[1]["tokens"] > 0
    assert len((await client.get("/v1/receipts", params={"limit": 1})).json()["data"]) == 1
    assert (await client.get("/v1/receipts", params={"artifact": "other"})).json()["data"] == []
    whole = (await client.get(f"/v1/receipts/{listed[1]['id']}")).json()
    assert whole["applied"][0]["artifact"] == "inline"
