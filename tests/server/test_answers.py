"""JSON never holds a number that is none: what would bring one is null, refused, or left out, and is never a 500."""

import asyncio
import json
import math
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from structlog.testing import capture_logs

from server.background.job import Control
from server.http.answers import JsonAnswer
from tests.server.test_steering import store
from vectors.artifact import Patch
from vectors.library import Library

BAD = {"scores": [1.0, math.nan, {"kl": math.inf}], "name": "x"}
CLEAN = {"scores": [1.0, None, {"kl": None}], "name": "x"}


def test_an_answer_says_null_and_logs_where() -> None:
    with capture_logs() as logs:
        assert json.loads(JsonAnswer(BAD).body) == CLEAN
    assert logs[0]["fields"] == ["scores[1]", "scores[2].kl"]


async def test_a_job_whose_result_is_not_finite_is_shown_and_listed(app: FastAPI, client: httpx.AsyncClient) -> None:
    async def work(_: Control) -> dict[str, Any]:
        return {"report": BAD}

    job = app.state.server.jobs.submit("test", work)
    async with asyncio.timeout(30):
        while job.finished_at is None:
            await asyncio.sleep(0)
    for body in ((await client.get(f"/v1/jobs/{job.id}")).json(), (await client.get("/v1/jobs")).json()["data"][0]):
        assert body["status"] == "succeeded" and body["result"] == {"report": CLEAN}


async def test_a_card_that_is_not_finite_cannot_be_stored_behind_the_checks(client: httpx.AsyncClient,
                                                                           library: Library) -> None:
    """What was stored once would be read for ever."""
    store(library, "one")
    with pytest.raises(Exception, match="not JSON compliant"):
        library.patch("one", Patch.model_construct(card=BAD, _fields_set={"card"}))
    assert (await client.get("/v1/artifacts/one")).json()["card"] is None
