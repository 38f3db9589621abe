"""Patches from captured activations over a scripted engine: which numbers act where, and what is refused."""

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from server.activations.store import StoredActivations
from steering.language.spec import Spec, Steering
from steering.programs.program import Program
from tests.server.conftest import MODEL, chat
from tests.server.scripted import WIDTH, ScriptedEngine
from tests.server.test_activations import TEXTS, captured
from tests.server.test_steering import ask, refused, store
from vectors.library import Library

ONE = {"prompt": {"positions": [-1]}, "generation": "none"}
UNKNOWN = "act-" + "0" * 24


def patch(source: str, scope: Any = ONE, **fields: Any) -> dict[str, Any]:
    options = {"source": source, **fields.pop("options", {})}
    return {"interventions": [{"op": "patch", "options": options, "scope": scope, **fields}]}


async def program(client: httpx.AsyncClient, engine: ScriptedEngine, steering: Any) -> tuple[Program, dict[str, Any]]:
    """What the engine was given, and the receipt."""
    receipt = (await ask(client, steering))["steering"]
    found = engine.completions[-1].generation.program
    assert found is not None
    return found, receipt


def row(found: Program, layer: int = 1, site: str = "resid_post", n: int = 0) -> dict[str, torch.Tensor]:
    return dict(found.compiled[n].rows[site, layer].tensors)  # type: ignore[index]


@pytest.mark.parametrize(("options", "index"), [
    ({"text": 0, "positions": [2]}, 2), ({"text": 1}, 3), ({"text": 2, "positions": [-1]}, 8),
    ({"text": 2, "positions": [0]}, 4), ({"row": 5}, 5)])
async def test_the_row_that_is_named_takes_the_place_of_the_token(client: httpx.AsyncClient, engine: ScriptedEngine,
                                                                  options: dict[str, Any], index: int) -> None:
    told, numbers = await captured(client)
    found, receipt = await program(client, engine, patch(told["id"], options=options, layers=[1]))
    assert set(found.compiled[0].rows) == {("resid_post", 1)}
    assert torch.equal(row(found)["offset"], numbers["resid_post.1"][index]) and not row(found)["scale"].any()
    [applied] = receipt["applied"]
    assert applied["artifact"] == "inline" and applied["options"]["source"] == told["id"]
    assert applied["tokens"] == {"prompt": 1, "generation": 0}


async def test_without_layers_all_of_the_source_act_and_means_have_one_row_a_text(client: httpx.AsyncClient,
                                                                                  engine: ScriptedEngine) -> None:
    told, numbers = await captured(client, pool="mean", dtype="bfloat16")
    everywhere = {"prompt": "all", "generation": "all"}
    found, _ = await program(client, engine, patch(told["id"], everywhere, options={"text": 2}))
    for layer in (1, 3):
        assert torch.equal(row(found, layer)["offset"], numbers[f"resid_post.{layer}"][2].float())


async def test_positions_as_they_were_asked_for_name_their_row(client: httpx.AsyncClient, engine: ScriptedEngine
                                                               ) -> None:
    told, numbers = await captured(client, positions=[-1, 0])
    for position, index in ((-1, 4), (0, 5), (4, 4)):
        found, _ = await program(client, engine, patch(told["id"], options={"text": 2, "positions": [position]}))
        assert torch.equal(row(found)["offset"], numbers["resid_post.1"][index]), position


async def test_several_tokens_go_where_the_scope_says_in_its_order(client: httpx.AsyncClient, engine: ScriptedEngine
                                                                   ) -> None:
    told, numbers = await captured(client)
    scope = {"prompt": {"positions": [3, -1, 0]}, "generation": "none"}
    found, receipt = await program(client, engine, patch(told["id"], scope, layers=[1], options={
        "text": 2, "positions": [0, 1, -1]}))
    assert [one.scope.prompt.positions for one in found.compiled] == [[3], [-1], [0]]  # type: ignore[union-attr]
    for n, index in enumerate((4, 5, 8)):
        assert torch.equal(row(found, n=n)["offset"], numbers["resid_post.1"][index])
    assert [one["tokens"]["prompt"] for one in receipt["applied"]] == [1, 1, 1]
    assert [one["options"]["positions"] for one in receipt["applied"]] == [[0], [1], [-1]]


async def test_a_direction_says_within_what_and_its_length_and_strength_do_not_matter(
        client: httpx.AsyncClient, engine: ScriptedEngine, library: Library) -> None:
    told, numbers = await captured(client)
    u = numbers["resid_post.3"][4]
    v = torch.arange(1.0, WIDTH + 1)
    store(library, "calm", 3.0)
    options, layers = {"text": 2, "positions": [0]}, [3]
    rows = []
    for factor in (1.0, 5.0):
        found, _ = await program(client, engine, patch(told["id"], options=options, layers=layers,
                                                       inline={"vector": (factor * v).tolist()}))
        rows.append(row(found, 3))
    h = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    unit = v / v.norm()
    for one in rows:
        changed = h + one["up"].T @ (one["down"] @ h + one["bias"])
        assert torch.allclose(changed, h + (u - h) @ unit * unit, atol=1e-5)
    # Of an artifact neither the op nor the strength counts.
    told, numbers = await captured(client, sites={"resid_post": [2]})
    found, receipt = await program(client, engine, patch(told["id"], options=options, artifact="calm"))
    stored = next(iter(library.source("calm").payload.layers.values()))["vector"]
    assert torch.allclose(row(found, 2)["up"][0], stored / stored.norm(), atol=1e-6)
    assert receipt["applied"][0]["artifact"] == "calm@1" and receipt["applied"][0]["strength"]["value"] == 1.0


async def test_single_heads_and_neurons(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    told, numbers = await captured(client, sites={"head_out": [1]})
    found, _ = await program(client, engine, patch(told["id"], site="head_out", options={"row": 4, "heads": [1]}))
    expected = numbers["head_out.1"][4].clone()
    expected[:4] = 0
    assert torch.equal(row(found, site="head_out")["offset"], expected)
    assert row(found, site="head_out")["scale"].tolist() == [1.0] * 4 + [0.0] * 4


async def test_a_source_that_is_deleted_hurts_no_request_that_was_planned(client: httpx.AsyncClient, app: FastAPI
                                                                          ) -> None:
    told, numbers = await captured(client)
    planner = app.state.server.planner
    steering = Steering.model_validate(patch(told["id"], options={"row": 1}, layers=[1]))
    plan = planner.plan(steering, None)
    assert (await client.delete(f"/v1/activations/{told['id']}")).status_code == 204
    planner.programs.kept.clear()
    weaker = planner.weakened(plan, [], [0.5])
    assert torch.allclose(row(weaker)["offset"], numbers["resid_post.1"][1] / 2)
    # The control: what is planned from now on does not find it, though its program would have been kept.
    assert (await refused(client, steering.model_dump(exclude_unset=True)))[:2] == (404, "not_found")


async def test_what_does_not_fit_is_refused_before_anything_runs(client: httpx.AsyncClient, engine: ScriptedEngine,
                                                                 library: Library) -> None:
    told, _ = await captured(client)
    begun = len(engine.completions)
    id, options = told["id"], {"text": 0, "positions": [0]}
    both = {"prompt": {"positions": [0, 1]}, "generation": "none"}
    store(library, "calm")
    cases: Sequence[tuple[Any, str, str]] = [
        (patch(UNKNOWN, options=options), "not_found", "options.source"),
        (patch("act-1", options=options), "invalid_spec", "options.source"),
        (patch(id, options={"text": 0}), "invalid_request", "options.positions"),
        (patch(id, options={"positions": [0]}), "invalid_request", "options.text"),
        (patch(id, options={"text": 3}), "invalid_request", "options.text"),
        (patch(id, options={"text": 1, "positions": [1]}), "invalid_request", "options.positions"),
        (patch(id, options={"text": 1, "positions": [-2]}), "invalid_request", "options.positions"),
        (patch(id, options={"row": 9}), "invalid_request", "options.row"),
        (patch(id, options={"row": 1, "text": 1}), "invalid_spec", "options"),
        (patch(id, options=options, site="mlp_out"), "artifact_mismatch", "options.source"),
        (patch(id, options=options, site="router"), "unsupported_site", "site"),
        (patch(id, options=options, layers=[2]), "artifact_mismatch", "layers"),
        (patch(id, options=options, artifact="calm"), "invalid_spec", "layers"),
        (patch(id, {"prompt": "all"}, options=options), "invalid_spec", "scope"),
        (patch(id, both, options={"text": 0, "positions": [0, 1, 2]}), "invalid_spec", "scope.prompt.positions"),
        (patch(id, both | {"generation": "all"}, options={"text": 0, "positions": [0, 1]}), "invalid_spec", "scope"),
        (patch(id, options={**options, "heads": [0]}), "invalid_spec", "options.heads"),
        (patch(id, options=options, layers=[1], inline={"basis": [[1.0] + [0.0] * 7], "mean": [0.0] * 8}),
         "invalid_spec", "inline.mean"),
        ({"interventions": [{"op": "patch", "layers": [1], "scope": ONE, "inline": {
            "vector": [1.0] * 8, "source": id}}]}, "invalid_spec", "options.source"),
        ({"interventions": [{"op": "patch", "layers": [1], "scope": ONE, "inline": {"vector": [1.0] * 8},
                             "options": {"text": 1}}]}, "invalid_spec", "options"),
    ]
    for steering, code, param in cases:
        _, found, where = await refused(client, steering)
        assert (found, where) == (code, f"steering.interventions[0].{param}"), steering
    assert len(engine.completions) == begun


async def test_other_weights_and_numbers_that_are_not_finite_are_refused(client: httpx.AsyncClient, app: FastAPI
                                                                         ) -> None:
    told, _ = await captured(client)
    stored: StoredActivations = app.state.server.activations
    path = stored.content(told["id"])
    numbers = load_file(path)
    numbers["resid_post.3"][0, 2] = float("inf")
    save_file(numbers, path, {"positions": "null"})
    code = await refused(client, patch(told["id"], options={"row": 0}))
    assert code == (400, "invalid_payload", "steering.interventions[0].options.source")
    # The control: another row is as good as it was.
    await ask(client, patch(told["id"], options={"row": 1}))
    described = path.with_suffix(".json")
    described.write_text(described.read_text().replace("f" * 64, "e" * 64))
    code = await refused(client, patch(told["id"], options={"row": 1}))
    assert code == (409, "artifact_mismatch", "steering.interventions[0].options.source")


async def test_no_stored_spec_names_what_expires(client: httpx.AsyncClient) -> None:
    told, _ = await captured(client)
    spec = patch(told["id"], options={"row": 0})
    for method, path, body in (("POST", "/v1/presets", {"name": "p", "spec": spec}),
                               ("PUT", "/v1/admin/default-spec", spec)):
        answer = await client.request(method, path, json=body)
        assert answer.status_code == 400 and "expire" in answer.text, (path, answer.text)
    with pytest.raises(ValidationError, match="expire"):
        Spec.model_validate(spec)


async def test_the_kill_switch_holds_and_strength_zero_does_nothing(client: httpx.AsyncClient, engine: ScriptedEngine
                                                                    ) -> None:
    told, _ = await captured(client)
    found, _ = await program(client, engine, patch(told["id"], options={"row": 0}, strength=0))
    assert not found.compiled[0].rows
    await client.put("/v1/admin/kill-switch", json={"on": True})
    receipt = (await ask(client, patch(told["id"], options={"row": 0})))["steering"]
    assert receipt["disabled"] and engine.completions[-1].generation.program is None


async def test_they_steer_what_reads_too(client: httpx.AsyncClient) -> None:
    told, _ = await captured(client)
    again, _ = await captured(client, input=[TEXTS[2]], steering=patch(told["id"], options={"row": 0}))
    assert again["applied"] == ["inline (patch)"]
    body = {"model": MODEL, "input": "hi", "steering": patch(UNKNOWN)}
    assert (await client.post("/v1/lens", json=body)).json()["error"]["param"].endswith("options.source")
    assert (await client.post("/v1/chat/completions", json=chat())).status_code == 200
