"""Which requests are worth a line of the log, and what it says of refused ones."""

import json

import httpx
import pytest

from tests.server.conftest import chat


async def test_refusals_say_where_and_polls_say_nothing(client: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]
                                                        ) -> None:
    for path in ("/metrics", "/health/live", "/v1/jobs"):
        assert (await client.get(path)).status_code == 200
    await client.post("/v1/chat/completions", json=chat(temperature=9))
    await client.get("/v1/jobs/job-x")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    told = [(line["route"], line["status"], line.get("param")) for line in lines if line["event"] == "request"]
    assert told == [("/v1/chat/completions", 400, "temperature"), ("/v1/jobs/{id}", 404, "id")]
