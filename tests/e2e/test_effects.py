"""Effects over HTTP: in the response, on /metrics and in /v1/effects, the same numbers."""

import re
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI

pytestmark = pytest.mark.asyncio(loop_scope="module")


def steering(report: str) -> dict[str, Any]:
    vectors = torch.randn(2, 1024, generator=torch.Generator().manual_seed(3))
    return {"interventions": [
        {"op": "add", "layers": [1], "inline": {"vector": vectors[0].tolist()},
         "strength": {"value": 40, "unit": "unit"}},
        {"op": "ablate", "layers": [2], "inline": {"vector": vectors[1].tolist()}, "scope": {"prompt": "none"}},
    ], "report": report}


def fitted(spec: dict[str, Any], d_model: int) -> dict[str, Any]:
    for item in spec["interventions"]:
        item["inline"]["vector"] = item["inline"]["vector"][:d_model]
    return spec


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("report", ["summary", "tokens"])
async def test_report(client: AsyncOpenAI, server_url: str, stream: bool, report: str) -> None:
    async with httpx.AsyncClient(base_url=server_url) as http:
        d_model = (await http.get("/v1/capabilities")).json()["d_model"]
        asked: dict[str, Any] = {"model": "lab-dense", "max_tokens": 12, "temperature": 0.0, "n": 2,
                                 "messages": [{"role": "user", "content": "How do I bake bread ?"}],
                                 "extra_body": {"steering": fitted(steering(report), d_model)}}
        if stream:
            chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
            extra = chunks[-1].model_extra
        else:
            extra = (await client.chat.completions.create(**asked)).model_extra
        assert extra is not None
        effects = extra["steering"]["effects"]
        assert effects["status"] == "measured" and len(effects["choices"]) == 2
        for choice in effects["choices"]:
            assert [i["op"] for i in choice["interventions"]] == ["add", "ablate"]
            assert choice["exact"] and choice["total"]["kl"]["mean"] > 0.01
            assert choice["total"]["kl"]["p50"] <= choice["total"]["kl"]["p95"] <= choice["total"]["kl"]["max"]
            if report == "tokens":
                per_token = choice["per_token"]
                assert len(per_token["kl"]) == choice["tokens"] == len(per_token["interventions"][1])
                assert sum(per_token["kl"]) / choice["tokens"] == pytest.approx(choice["total"]["kl"]["mean"], rel=1e-4)
            else:
                assert choice.get("per_token") is None

        metrics = (await http.get("/metrics")).text
        rows = (await http.get("/v1/effects", params={"artifact": "all"})).json()["data"]
        found = re.search(r'trimtab_effect_kl_nats_sum\{artifact="all",model="lab-dense",op="all",preset=""\} (\S+)',
                          metrics)
        count = re.search(r'trimtab_effect_kl_nats_count\{artifact="all",model="lab-dense",op="all",preset=""\} (\S+)',
                          metrics)
        assert found and count
        assert rows[0]["completions"] == float(count[1])
        assert rows[0]["kl_mean"] * rows[0]["completions"] == pytest.approx(float(found[1]), rel=1e-4)


async def test_an_unsteered_request_says_that_nothing_was_applied(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="lab-dense", prompt="Review:", max_tokens=3,
                                             extra_body={"steering": {"report": "summary"}})
    assert answer.model_extra is not None
    assert answer.model_extra["steering"]["effects"]["status"] == "unsteered"
