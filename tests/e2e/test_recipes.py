"""Extraction by method over HTTP: a function vector, from word pairs to a steered answer."""

import asyncio
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from lab import datasets

pytestmark = pytest.mark.asyncio(loop_scope="module")


def pairs(task: str) -> list[dict[str, Any]]:
    return [{key: record[key] for key in ("input", "output", "split")} for record in datasets.load("task_pairs")
            if record["task"] == task]


async def done(http: httpx.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    while job["status"] in ("queued", "running"):
        await asyncio.sleep(0.05)
        job = (await http.get(f"/v1/jobs/{job['id']}")).json()
    return job


async def test_function_vector_from_pairs_to_answers(client: AsyncOpenAI, server_url: str) -> None:
    async with httpx.AsyncClient(base_url=server_url, timeout=300) as http:
        methods = {m["name"]: m for m in (await http.get("/v1/extract/methods")).json()["data"]}
        assert "pairs" in methods["function_vector"]["request"]["properties"]
        job = await done(http, (await http.post("/v1/extract/function_vector", json={
            "name": "plural", "pairs": pairs("plural"), "other_pairs": pairs("past"), "shots": 5, "num_prompts": 15,
        })).json())
        assert job["status"] == "succeeded", job
        report = job["result"]["report"]
        assert report["test"]["steered"] > report["controls"]["random_vectors"]["max"] + 0.2
        assert report["test"]["steered"] > report["test"]["zero_shot"] + 0.2

        test = [pair for pair in pairs("plural") if pair["split"] == "test"]
        scope = {"prompt": {"positions": [-1]}, "generation": "all"}

        async def right(steering: dict[str, Any]) -> int:
            answers = await asyncio.gather(*(client.completions.create(
                model="lab-dense", prompt=f"{pair['input']} ->", max_tokens=1, temperature=0,
                extra_body={"steering": steering}) for pair in test))
            return sum(answer.choices[0].text.strip() == pair["output"].strip()
                       for answer, pair in zip(answers, test, strict=True))

        unsteered = await right({})
        steered = await right({"interventions": [{"artifact": job["result"]["artifact"], "scope": scope}]})
        assert steered >= unsteered + 0.2 * len(test)


@pytest.mark.parametrize(("method", "body", "param"), [
    ("no_such_method", {}, "method"),
    ("function_vector", {"name": "x"}, "pairs"),
    ("function_vector", {"name": "x", "pairs": [], "unknown": 1}, "pairs"),
    ("tunable_experts", {"name": "../x"}, "name"),
])
async def test_bad_requests_name_the_field(server_url: str, method: str, body: dict[str, Any], param: str) -> None:
    async with httpx.AsyncClient(base_url=server_url) as http:
        answer = await http.post(f"/v1/extract/{method}", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(param)
        assert answer.json()["error"]["code"] == "invalid_request"
