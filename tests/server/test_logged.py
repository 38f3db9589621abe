"""Which requests are worth a line of the log, and what it says of refused ones."""

import json
import logging

import httpx
import pytest
from fastapi import FastAPI

from server.settings import Settings
from tests.server.conftest import chat

STEERED = {"interventions": [{"op": "add", "layers": [1], "inline": {"vector": [1.0] * 8}}]}


async def test_refusals_say_where_and_polls_say_nothing(client: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]
                                                        ) -> None:
    for path in ("/metrics", "/health/live", "/v1/jobs"):
        assert (await client.get(path)).status_code == 200
    await client.post("/v1/chat/completions", json=chat(temperature=9))
    await client.get("/v1/jobs/job-x")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    told = [(line["route"], line["status"], line.get("param")) for line in lines if line["event"] == "request"]
    assert told == [("/v1/chat/completions", 400, "temperature"), ("/v1/jobs/{id}", 404, "id")]


class TestIds:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"shadow_sample": 1.0, "shadow_budget": 10.0, "outcome_sample": 1.0})

    async def test_every_line_of_a_request_has_its_id_also_what_is_done_after_it(
            self, client: httpx.AsyncClient, app: FastAPI, capsys: pytest.CaptureFixture[str],
            monkeypatch: pytest.MonkeyPatch) -> None:
        """The script cannot be measured and the grader is broken: both are said behind the answer."""
        state = app.state.server

        async def broken(work: object) -> None:
            raise ValueError("no grader today")

        def answered(*_: object) -> None:
            logging.getLogger("a.library").warning("deep inside")

        monkeypatch.setattr(state.live_grading, "_apart", broken)
        monkeypatch.setattr(state.metrics, "gates", answered)
        answers = [await client.post("/v1/chat/completions", json=chat(steering=STEERED)) for _ in range(2)]
        await state.shadow.drained()
        await state.live_grading.drained()
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
        for answer in answers:
            mine = [line["event"] for line in lines if line.get("request_id") == answer.headers["X-Trimtab-Request"]]
            assert sorted(mine) == ["deep inside", "live_grading_failed", "request", "shadow_failed"]
        assert all("request_id" in line for line in lines)
