"""Readiness and liveness are what the engine says of itself."""

import httpx
import pytest

from server.engines.data import Condition
from tests.server.scripted import ScriptedEngine


@pytest.mark.parametrize(("state", "ready", "live"), [
    (Condition(ready=True), 200, 200),
    (Condition(ready=False, reason="restarting", retry_after_s=12), 503, 200),
    (Condition(ready=False, reason="stalled"), 503, 200),
    (Condition(ready=False, live=False, reason="exhausted"), 503, 503),
    (Condition(ready=False, live=False, reason="hung"), 503, 503),
])
async def test_health_follows_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine, state: Condition,
                                         ready: int, live: int) -> None:
    engine.state = state
    answers = {path: await client.get(f"/health{path}") for path in ("", "/ready", "/live")}
    assert [answers[path].status_code for path in ("", "/ready", "/live")] == [200, ready, live]
    if ready == 503:
        error = answers["/ready"].json()["error"]
        assert error["code"] == "engine_unavailable" and str(state.error().message) in error["message"]
        assert answers["/ready"].headers["Retry-After"] == str(int(state.retry_after_s or 1))


async def test_metrics_tell_condition_and_restarts(client: httpx.AsyncClient, engine: ScriptedEngine,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    async def lines() -> list[str]:
        return (await client.get("/metrics")).text.splitlines()

    found = await lines()
    for line in ("trimtab_engine_ready 1.0", "trimtab_engine_live 1.0",
                 'trimtab_engine_restarts_total{reason="restarting"} 0.0',
                 'trimtab_engine_restarts_total{reason="stalled"} 0.0'):
        assert line in found
    monkeypatch.setattr(engine, "restarts", lambda: {"restarting": 2, "stalled": 1})
    engine.state = Condition(ready=False, live=False, reason="hung")
    for _ in range(2):
        found = await lines()
    for line in ("trimtab_engine_ready 0.0", "trimtab_engine_live 0.0",
                 'trimtab_engine_restarts_total{reason="restarting"} 2.0',
                 'trimtab_engine_restarts_total{reason="stalled"} 1.0'):
        assert line in found
