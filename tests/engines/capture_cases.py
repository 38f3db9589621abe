"""Captures over HTTP, of one engine's server, against plain Hugging Face hooks on the same weights."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import torch
from safetensors.torch import load

from tests.engines import reference as ref
from tests.engines.cases import vector

TEXTS = ([5, 6, 7, 8, 9, 10, 11], [40, 41], list(range(20, 63)))


async def captures_equal_hooks(client: httpx.AsyncClient, name: str, model: Any, sites: dict[str, list[int]],
                               tolerance: float) -> None:
    """Untouched, and under a vector at layer 1: every row of every site, and means.

    tolerance: relative to the largest number of a tensor.
    """
    push = vector(3, model.config.hidden_size, 4.0)
    spec = {"interventions": [{"op": "add", "layers": [1], "inline": {"vector": push.tolist()}}]}
    added = [ref.Edit("resid_post", 1, ref.add(push), ref.everywhere)]
    plain = await _captured(client, name, sites=sites)
    steered = await _captured(client, name, sites=sites, steering=spec)
    means = await _captured(client, name, sites=sites, pool="mean", positions=[-1, 0])
    for site, layers in sites.items():
        for layer in layers:
            column = f"{site}.{layer}"
            untouched = [seen(model, text, [], site, layer) for text in TEXTS]
            moved = [seen(model, text, added, site, layer) for text in TEXTS]
            _check(plain[column], torch.cat(untouched), tolerance, column)
            _check(steered[column], torch.cat(moved), tolerance, column)
            _check(means[column], torch.stack([rows[[-1, 0]].mean(dim=0) for rows in untouched]), tolerance, column)
    # The control: behind the vector the model is elsewhere.
    assert not torch.allclose(plain["resid_post.2"], steered["resid_post.2"], atol=0.1)


def _check(found: torch.Tensor, expected: torch.Tensor, tolerance: float, column: str) -> None:
    """tolerance: of the largest number, because the first token's are hundreds of times those of others."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()), column


async def _captured(client: httpx.AsyncClient, name: str, **fields: Any) -> dict[str, torch.Tensor]:
    answer = await client.post("/v1/activations", json={"model": name, "input": TEXTS, **fields})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    while job["status"] not in ("succeeded", "failed"):
        await asyncio.sleep(0.02)
        job = (await client.get(f"/v1/jobs/{job['id']}")).json()
    assert job["status"] == "succeeded", job
    return load((await client.get(f"/v1/activations/{job['result']['id']}/content")).content)


def seen(model: Any, text: Sequence[int], edits: Sequence[ref.Edit], site: str, layer: int) -> torch.Tensor:
    """The activation `[T, width]` at a place, after `edits`."""
    found: list[torch.Tensor] = []

    def look(h: torch.Tensor) -> torch.Tensor:
        found.append(h.clone())
        return h

    ref.logprobs(model, text, len(text), [*edits, ref.Edit(site, layer, look, ref.everywhere)])
    return found[0]
