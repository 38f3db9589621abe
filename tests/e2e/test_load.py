"""200 concurrent requests with 50 distinct specs through 16 slots, then 300 or 2 000 more: right, complete, flat."""

import asyncio
import gc
from typing import Any

import httpx
import psutil
import pytest
import torch
from openai import AsyncOpenAI

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_SPECS, CONCURRENT = 50, 200
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")


def spec(i: int, d_model: int) -> dict[str, Any]:
    """One of 50 specs, of six ops, sites and scopes; every tenth is none at all."""
    if i % 10 == 9:
        return {}
    generator = torch.Generator().manual_seed(i)
    vector = torch.randn(d_model, generator=generator)
    scope = ({}, {"prompt": "none"}, {"generation": "none"}, {"prompt": {"positions": [-1]}})[i % 4]
    common = {"layers": [i % 4], "site": SITES[i % 4], "scope": scope}
    dims = list(range(i, d_model, 7))
    op: dict[str, Any] = (
        {"op": "add", "inline": {"vector": vector.tolist()}, "strength": {"value": 4.0, "unit": "unit"}},
        {"op": "ablate", "inline": {"vector": vector.tolist()}},
        {"op": "add", "inline": {"vector": vector.tolist()}, "options": {"norm_match": True}, "strength": 0.5},
        {"op": "clamp", "inline": {"vector": vector.tolist(), "value": 2.0}},
        {"op": "sign_flip", "inline": {"dims": dims, "polarity": [1] * len(dims)}},
        {"op": "mask", "inline": {"dims": list(range(i % 5, d_model, 9))}},
    )[i % 6]
    return {"steering": {"interventions": [{**op, **common}]}}


async def ask(client: AsyncOpenAI, i: int, d_model: int, max_tokens: int = 8) -> tuple[str, tuple[float, ...], int]:
    answer = await client.chat.completions.create(
        model="lab-dense", messages=[{"role": "user", "content": f"How do I bake a cake number {i % 23} ?"}],
        max_tokens=max_tokens, temperature=0.0 if i % 2 else 1.0, seed=i, logprobs=True,
        extra_body=spec(i % NUM_SPECS, d_model))
    receipt: Any = answer.model_extra["steering"] if answer.model_extra else None
    logprobs = tuple(entry.logprob for entry in answer.choices[0].logprobs.content or [])
    return answer.choices[0].message.content or "", logprobs, len(receipt["applied"])


@pytest.mark.parametrize("more_requests", [pytest.param(count, marks=pytest.mark.slow) for count in (300, 2000)])
async def test_load(client: AsyncOpenAI, server_url: str, more_requests: int) -> None:
    async with httpx.AsyncClient(base_url=server_url, timeout=60) as http:
        d_model = (await http.get("/v1/capabilities")).json()["d_model"]
        together = await asyncio.gather(*(ask(client, i, d_model) for i in range(CONCURRENT)))
        for i in range(0, CONCURRENT, 3):
            text, logprobs, applied = await ask(client, i, d_model)
            assert text == together[i][0]
            assert logprobs == pytest.approx(together[i][1], abs=1e-3)
            assert applied == together[i][2] == (0 if i % 10 == 9 else 1)

        async def more(count: int) -> int:
            gate = asyncio.Semaphore(100)

            async def one(i: int) -> int:
                async with gate:
                    return len((await ask(client, i, d_model, max_tokens=2))[1])

            return sum(n > 0 for n in await asyncio.gather(*(one(i) for i in range(count))))

        # Caches, pools and allocators fill up in the first third; what grows after that would grow for ever.
        assert await more(more_requests // 3) == more_requests // 3
        gc.collect()
        before = psutil.Process().memory_info().rss
        rest = more_requests - more_requests // 3
        assert await more(rest) == rest
        gc.collect()
        grown = psutil.Process().memory_info().rss - before
        # A hundred requests do not fill them yet.
        if more_requests >= 2000:
            assert grown < 24 * 2**20, f"{grown / 2**20:.1f} MiB more after {rest} requests"
        async with asyncio.timeout(60):
            # The batching loop takes the last request off its list after the client has its answer.
            while 'trimtab_engine{stat="running"} 0.0' not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.01)
        assert 'trimtab_engine{stat="slots_used"} 0.0' in (await http.get("/metrics")).text
