"""The same requests to the vLLM engine and to the embedded one: same text, same receipt."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from lab import model_path
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from steering.artifacts.payload import Payload
from steering.language.gates import Reading
from tests.engines.cases import vector
from tests.engines.vllm.apps import Running, client_of, make_app
from tests.engines.vllm.conftest import Group
from vectors.artifact import Metadata

CHAT = "/v1/chat/completions"
TURNS = [{"role": "user", "content": "How do I bake bread ?"}]
MIXED = [{"role": "system", "content": "You are a cook ."}, *TURNS]


def requests_of(d: int, num_experts: int) -> list[dict[str, Any]]:
    """Bodies of chat completions: stored and inline, units, options, scopes, stacks, reports, choices."""
    push, basis = vector(1, d), torch.linalg.qr(vector(2, 2 * d).reshape(d, 2)).Q.T
    inline = {"op": "add", "layers": [1, 3], "inline": {"vector": push.tolist()},
              "strength": {"value": 8, "unit": "unit"}}
    bodies: list[dict[str, Any]] = [
        {},
        {"steering": {"interventions": [{"artifact": "stored", "strength": 1.5}], "report": "tokens"}},
        {"steering": {"interventions": [{"artifact": "stored@1", "layers": [2], "strength": -2, "scope": {
            "prompt": {"positions": [-1]}, "generation": {"windows": [[0, 6]]}}}], "report": "tokens"}, "n": 2},
        {"steering": {"interventions": [inline, {"op": "ablate", "layers": "all", "inline": {"basis": basis.tolist()}}],
                      "report": "tokens"}},
        {"steering": {"interventions": [
            {"op": "rotate", "layers": [4], "inline": {"basis": basis.tolist(), "angle": 90},
             "scope": {"prompt": {"roles": ["user"]}, "generation": "none"}},
            {**inline, "scope": {"prompt": "none", "generation": {"exclude": {"positions": [2]}}}}],
            "report": "tokens"}, "messages": MIXED},
        {"steering": {"interventions": [{**inline, "strength": 0}]}},
        # One of the two is open for any prompt; the third looks at every token.
        *({"steering": {"interventions": [{**inline, "gate": {"probe": "probe", "direction": direction}}]}}
          for direction in ("above", "below")),
        {"steering": {"interventions": [{**inline, "layers": [2], "gate": {"probe": "probe", "when": "token"}}],
                      "report": "tokens"}},
    ]
    # Weakened on the way: one of two, and to the end.
    bodies += [{"steering": {"interventions": [inline, {"artifact": "stored", "strength": 0.5}], "report": "tokens",
                             "guard": {"max_kl": 0.05, "every": 4, "action": action}}} for action in ("lower", "stop")]
    # What the answer is held to writes the marks of a block of JSON, so scopes find one.
    block = {"regex": r"[a-z]{3,9} ```json\n\{\}\n``` [a-z]{3,5}"}
    bodies += [{"structured_outputs": block, "max_tokens": 60, "steering": {"interventions": [
        {**inline, "scope": {"prompt": "none", "generation": scope}}], "report": "tokens"}}
        for scope in ({"sections": ["json"]}, {"exclude": {"sections": ["json"]}})]
    schema = {"type": "object", "properties": {"day": {"enum": ["Monday", "Friday"]}}, "required": ["day"],
              "additionalProperties": False}
    bodies += [{"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
                "max_tokens": 40, "steering": {"interventions": [inline]}},
               {"structured_outputs": {"choice": ["yes", "no, thanks"]}, "steering": {"interventions": [inline]}},
               {"structured_outputs": {"grammar": 'root ::= [a-f]+ "."'}, "steering": {"interventions": [inline]}},
               {"min_tokens": 4, "stop_token_ids": [40, 41, 42], "allowed_token_ids": list(range(40, 90)),
                "bad_words": ["the", "a"], "steering": {"interventions": [inline]}}]
    if num_experts:
        bodies.append({"steering": {"interventions": [{"op": "expert_mask", "inline": {
            "experts": {"0": [1, 4], "2": [3]}, "mode": "off_refill"}}], "report": "tokens"}})
    return [{"model": "unset", "messages": TURNS, "max_tokens": 16, "temperature": 0.0, "logprobs": True,
             "top_logprobs": 3, **body} for body in bodies]


async def same_answers_over_http(group: Group, folder: Path) -> None:
    # Cached tokens are told, and sizes of steps are means over those that were computed: pages must be of one size.
    embedded = TransformersEngine(EngineOptions(model=str(model_path(group.name)), model_id=group.name,
                                                kv_cache_tokens=4096, self_test=False, dtype="float32",
                                                page_size=group.engine.options.block_size))
    bodies = [body | {"model": group.name} for body in requests_of(group.engine.facts.d_model,
                                                                   group.engine.facts.num_experts)]
    ours = await _answers(make_app(group.name, Running(group.engine), "vllm", folder / "vllm"), bodies)
    theirs = await _answers(make_app(group.name, embedded, "transformers", folder / "embedded"), bodies)
    texts = set()
    for body, one, other in zip(bodies, ours, theirs, strict=True):
        assert one["steering"].pop("engine") == "vllm"
        assert other["steering"].pop("engine") == "transformers"
        same_numbers(one["steering"], other["steering"])
        assert one["usage"] == other["usage"]
        for a, b in zip(one["choices"], other["choices"], strict=True):
            assert a["message"] == b["message"] and a["finish_reason"] == b["finish_reason"]
            for x, y in zip(a["logprobs"]["content"], b["logprobs"]["content"], strict=True):
                assert x["token"] == y["token"] and x["logprob"] == pytest.approx(y["logprob"], abs=1e-4)
        texts.add(one["choices"][0]["message"]["content"])
        assert bool(one["steering"]["applied"]) == ("steering" in body)
        guarded = "guard" in body.get("steering", {})
        assert guarded == any(choice["guard"] for item in one["steering"]["applied"] for choice in item["choices"])
    assert len(texts) > 2, "the specs do not show in the text"


def same_numbers(mine: Any, reference: Any) -> None:
    """Receipts and effects agree: names, words and counts exactly, measured numbers nearly, times not at all."""
    if isinstance(reference, dict):
        assert mine.keys() == reference.keys()
        for key in reference:
            if not key.endswith(("_s", "_ms", "seconds")):
                same_numbers(mine[key], reference[key])
    elif isinstance(reference, list):
        for a, b in zip(mine, reference, strict=True):
            same_numbers(a, b)
    elif isinstance(reference, float):
        assert mine == pytest.approx(reference, abs=1e-3, rel=1e-3)
    else:
        assert mine == reference


async def _answers(app: FastAPI, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async with client_of(app) as client:
        state = app.state.server
        facts = state.engine.facts
        store(state.library, facts)
        return [await answer(client, body) for body in bodies]


def store(library: Any, facts: Any) -> str:
    """An artifact "stored" with a direction at two layers, and a probe of one layer."""
    reads = Metadata(name="probe", kind="probe", op="add", site="resid_post", fingerprint=facts.fingerprint,
                     reading=Reading(pool="last", threshold=0.0))
    library.create(reads, Payload.build("probe", {2: {"weight": vector(3, facts.d_model),
                                                      "bias": torch.tensor(0.0)}}))
    metadata = Metadata(name="stored", kind="vector", op="add", site="resid_post", fingerprint=facts.fingerprint)
    found: str = library.create(metadata, Payload.build("vector", {
        layer: {"vector": vector(10 + layer, facts.d_model, 4.0)} for layer in (1, 2)})).ref
    return found


async def answer(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found
