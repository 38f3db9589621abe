"""Patches from captured activations over HTTP, of one engine's server, against plain Hugging Face hooks.

A mixed batch of requests, each with another part of another run: the reference reads that run with hooks of its own,
and puts its numbers into the base run with hooks.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import torch

from tests.engines import reference as ref
from tests.engines.capture_cases import seen
from tests.engines.cases import basis_of, vector

SOURCE, BASE = [40, 41, 42, 43, 44, 45, 46], [5, 6, 7, 8, 9]
TEXTS = [[9, 8, 7], SOURCE]
STEPS = 6
LAYER = 2


def _at(*positions: int) -> Callable[[int, int], list[bool]]:
    return lambda prompt, total: [t in positions for t in range(total)]


def _scope(*positions: int) -> dict[str, Any]:
    return {"prompt": {"positions": list(positions)}, "generation": "none"}


def _cases(id: str, model: Any, sites: Sequence[str]) -> list[tuple[dict[str, Any], list[ref.Edit]]]:
    """Interventions and the same as hooks: whole states, several tokens, a subspace, a direction, heads, neurons."""
    config = model.config
    d, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
    basis, v = basis_of(4, 3, d), vector(5, d, 3.0)
    unit = (v / v.norm())[None]

    def run(site: str) -> torch.Tensor:
        return seen(model, SOURCE, [], site, LAYER)

    def step(site: str, positions: list[int], scope: Any, options: Any = None, **fields: Any) -> dict[str, Any]:
        return {"op": "patch", "site": site, "layers": [LAYER], "scope": scope, **fields,
                "options": {"source": id, "text": 1, "positions": positions, **(options or {})}}

    post, out = run("resid_post"), run("head_out")
    third = list(range(width, 2 * width))
    everywhere = {"prompt": "all", "generation": "all"}
    cases = [
        (step("resid_post", [5], _scope(-1)), [ref.Edit("resid_post", LAYER, ref.replace_by(post[5]), _at(4))]),
        (step("resid_post", [-1, 2], _scope(1, 3)), [
            ref.Edit("resid_post", LAYER, ref.replace_by(post[6]), _at(1)),
            ref.Edit("resid_post", LAYER, ref.replace_by(post[2]), _at(3))]),
        (step("resid_post", [4], everywhere, inline={"basis": basis.tolist()}), [
            ref.Edit("resid_post", LAYER, ref.replace_by(post[4], basis), ref.everywhere)]),
        *((step("resid_post", [3], _scope(2, 4), inline={"vector": (factor * v).tolist()}), [
            ref.Edit("resid_post", LAYER, ref.replace_by(post[3], unit), _at(2, 4))]) for factor in (1, 5)),
        (step("head_out", [6], _scope(-1), {"heads": [1]}), [
            ref.Edit("head_out", LAYER, ref.set_columns(third, out[6][third]), _at(4))]),
    ]
    if "mlp_act" in sites:
        act = run("mlp_act")
        cases.append((step("mlp_act", [5], _scope(-1), {"neurons": [3, 8, 11]}), [
            ref.Edit("mlp_act", LAYER, ref.set_columns([3, 8, 11], act[5][[3, 8, 11]]), _at(4))]))
    assert heads > 1
    return cases


async def patches_equal_hooks(client: httpx.AsyncClient, name: str, model: Any, sites: Sequence[str], tolerance: float
                              ) -> None:
    id = await _captured(client, name, TEXTS, sites)
    cases = _cases(id, model, sites)
    # Twice, so that requests with the same program and with others run side by side, and one without any.
    answers = await asyncio.gather(*(_completed(client, name, spec) for spec, _ in [*cases, *cases]),
                                   _completed(client, name, None))
    plain = answers.pop()
    _check(model, plain, [], tolerance)
    for (_, edits), answer in zip([*cases, *cases], answers, strict=True):
        _check(model, answer, edits, tolerance)
    # The control: each of them changes something, and 5 v is what v is.
    assert all(abs(answer["logprobs"][0] - plain["logprobs"][0]) > 10 * tolerance for answer in answers)
    assert answers[3]["tokens"] == answers[4]["tokens"]
    # A source that is gone is not found, and one of the run itself changes nothing.
    own = await _captured(client, name, [BASE], sites)
    same = {"op": "patch", "layers": [LAYER], "scope": _scope(*range(5)),
            "options": {"source": own, "positions": list(range(5))}}
    again = await _completed(client, name, same)
    assert again["tokens"] == plain["tokens"]
    assert max(abs(a - b) for a, b in zip(again["logprobs"], plain["logprobs"], strict=True)) <= tolerance
    await client.delete(f"/v1/activations/{id}")
    answer = await client.post("/v1/completions", json=_body(name, cases[0][0]))
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "steering.interventions[0].options.source"


def _body(name: str, spec: dict[str, Any] | None) -> dict[str, Any]:
    steering = {} if spec is None else {"steering": {"interventions": [spec]}}
    return {"model": name, "prompt": BASE, "max_tokens": STEPS, "temperature": 0, "logprobs": 1, "ignore_eos": True,
            "return_token_ids": True, **steering}


async def _completed(client: httpx.AsyncClient, name: str, spec: dict[str, Any] | None) -> dict[str, Any]:
    answer = await client.post("/v1/completions", json=_body(name, spec))
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return {"tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"]}


def _check(model: Any, answer: dict[str, Any], edits: Sequence[ref.Edit], tolerance: float) -> None:
    expected = ref.logprobs(model, [*BASE, *answer["tokens"]], len(BASE), edits)
    for n, (token, found) in enumerate(zip(answer["tokens"], answer["logprobs"], strict=True)):
        assert abs(float(expected[len(BASE) - 1 + n, token]) - found) <= tolerance, (edits, n)


async def _captured(client: httpx.AsyncClient, name: str, texts: Sequence[Sequence[int]], sites: Sequence[str]) -> str:
    answer = await client.post("/v1/activations", json={
        "model": name, "input": texts, "sites": {site: [LAYER] for site in sites}})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    while job["status"] not in ("succeeded", "failed"):
        await asyncio.sleep(0.02)
        job = (await client.get(f"/v1/jobs/{job['id']}")).json()
    assert job["status"] == "succeeded", job
    return str(job["result"]["id"])
