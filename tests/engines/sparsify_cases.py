"""Sparsification over HTTP, of one engine's server, against plain Hugging Face hooks: the lengths of columns are those
of the model's own weights, which the server reads by itself."""

import asyncio
from typing import Any

import httpx
import torch

from tests.engines import reference as ref

BASE, STEPS = [5, 6, 7, 8, 9, 30, 31, 32], 6
LATER = {"prompt": {"exclude": {"positions": [0]}}, "generation": "all"}


async def sparsified_equals_hooks(client: httpx.AsyncClient, name: str, model: Any, sites: list[str], tolerance: float
                                  ) -> None:
    """A mixed batch of methods and shares; a share of 0 is what is untouched, to the last bit that is told."""
    layers = range(model.config.num_hidden_layers)
    maps = {"mlp_act": lambda block: block.mlp.down_proj, "head_out": lambda block: block.self_attn.o_proj}
    cases: list[tuple[dict[str, Any], list[ref.Edit]]] = []
    for site in sites:
        columns = [maps[site](model.model.layers[n]).weight.detach().square().sum(0).sqrt() for n in layers]
        for share in (0.25, 0.5):
            cases += [
                (step("wina", share, site), [ref.Edit(site, n, ref.small_left_out(share, columns[n]), ref.everywhere)
                                             for n in layers]),
                (step("magnitude", share, site, layers=[1, 3], scope=LATER), [
                    ref.Edit(site, n, ref.small_left_out(share, torch.ones_like(columns[n])), _but_first)
                    for n in (1, 3)])]
    zero = [step(method, 0.0, sites[0]) for method in ("wina", "magnitude", "random")]
    drawn = step("random", 0.5, sites[0])
    specs = [spec for spec, _ in cases]
    *answers, plain = await asyncio.gather(*(_completed(client, name, spec) for spec in [*specs, *zero, drawn, None]))
    for (_, edits), answer in zip(cases, answers, strict=False):
        check(model, answer, edits, tolerance)
        assert abs(answer["logprobs"][0] - plain["logprobs"][0]) > 10 * tolerance
    check(model, plain, [], tolerance)
    # Alone, as rounding may go by the batch.
    alone = await _completed(client, name, None)
    for spec in zero:
        assert await _completed(client, name, spec) == alone
    assert (await _completed(client, name, drawn))["logprobs"] != alone["logprobs"]

    refused = await client.post("/v1/completions", json=_body(name, step("chess", 0.5, sites[0])))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "steering.interventions[0].options.method"


def step(method: str, share: float, site: str, **fields: Any) -> dict[str, Any]:
    return {"op": "sparsify", "site": site, "options": {"method": method, "share": share}, **fields}


def _but_first(prompt: int, total: int) -> list[bool]:
    return [t > 0 for t in range(total)]


def check(model: Any, answer: dict[str, Any], edits: list[ref.Edit], tolerance: float) -> None:
    expected = ref.logprobs(model, [*BASE, *answer["tokens"]], len(BASE), edits)
    for n, (token, found) in enumerate(zip(answer["tokens"], answer["logprobs"], strict=True)):
        assert abs(float(expected[len(BASE) - 1 + n, token]) - found) <= tolerance, (edits, n)


def _body(name: str, spec: dict[str, Any] | None) -> dict[str, Any]:
    steering = {} if spec is None else {"steering": {"interventions": [spec]}}
    return {"model": name, "prompt": BASE, "max_tokens": STEPS, "temperature": 0, "logprobs": 1, "ignore_eos": True,
            "return_token_ids": True, **steering}


async def _completed(client: httpx.AsyncClient, name: str, spec: dict[str, Any] | None) -> dict[str, Any]:
    answer = await client.post("/v1/completions", json=_body(name, spec))
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return {"tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"]}
