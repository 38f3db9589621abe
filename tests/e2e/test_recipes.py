"""Extraction by method over HTTP: a function vector, from word pairs to a steered answer."""

import asyncio
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from lab import datasets
from lab.corpus import calendar

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
    ("function_vector", {"name": "x", "pairs": []}, "pairs"),
    ("function_vector", {"name": "x", "pairs": [], "unknown": 1}, "unknown"),
    ("tunable_experts", {"name": "../x"}, "name"),
])
async def test_bad_requests_name_the_field(server_url: str, method: str, body: dict[str, Any], param: str) -> None:
    async with httpx.AsyncClient(base_url=server_url) as http:
        answer = await http.post(f"/v1/extract/{method}", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(param)
        assert answer.json()["error"]["code"] == "invalid_request"


@pytest.mark.slow
async def test_a_ring_of_weekdays_from_prompts_to_moved_answers(client: AsyncOpenAI, server_url: str) -> None:
    days = calendar.WEEKDAYS
    known = [r for r in datasets.load("calendar") if r["series"] == "weekdays"]
    async with httpx.AsyncClient(base_url=server_url, timeout=300) as http:
        job = await done(http, (await http.post("/v1/extract/manifold", json={
            "name": "ring", "layout": "cyclic", "order": days, "layers": [4, 5], "rank": 32, "steps": 3, "max_eval": 1,
            "max_pairs": 4, "examples": [{"text": r["text"], "label": r["answer"].strip(), "item": r["item"],
                                          "split": r["split"]} for r in known]})).json())
        assert job["status"] == "succeeded", job
        report = job["result"]["report"]
        assert report["test"]["swap"] > report["controls"]["shuffled_labels"]["max"]

        async def said(prompt: str, **options: Any) -> str:
            steering = {"interventions": [{"artifact": "ring", "options": options, "scope": {
                "prompt": {"positions": [-1]}, "generation": "none"}}]} if options else {}
            answer = await client.completions.create(model="lab-dense", prompt=prompt, max_tokens=1, temperature=0,
                                                     extra_body={"steering": steering})
            return answer.choices[0].text.strip()

        asked = [r for r in known if r["split"] == "test"][:6]
        for record in asked:
            own = record["answer"].strip()
            moved = days[(days.index(own) + 3) % 7]
            assert await said(record["text"]) == own
            assert await said(record["text"], target=moved) == moved
            assert await said(record["text"], shift=3) == moved
        refused = await http.post("/v1/completions", json={
            "model": "lab-dense", "prompt": "It is", "max_tokens": 1,
            "steering": {"interventions": [{"artifact": "ring", "options": {"target": "Someday"}}]}})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "steering.interventions[0].options.target"
        assert "Thursday" in refused.json()["error"]["message"]
