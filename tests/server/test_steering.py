"""What a request's steering means: order, presets, default spec, kill switch, receipts, errors by path."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from server.settings import Settings
from steering.artifacts.payload import Payload
from steering.language.spec import Spec
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from vectors.artifact import Metadata
from vectors.library import Library

URL = "/v1/chat/completions"


def store(library: Library, name: str, value: float = 1.0, **fields: Any) -> str:
    metadata = Metadata(name=name, kind="vector", op="add", site="resid_post", **fields)
    return library.create(metadata, Payload.build("vector", {2: {"vector": torch.full((8,), value)}})).ref


def names(receipt: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item["source"], item["artifact"]) for item in receipt["applied"]]


async def ask(client: httpx.AsyncClient, steering: Any = None, model: str = MODEL, **fields: Any) -> dict[str, Any]:
    body = chat(**fields) | {"model": model} | ({} if steering is None else {"steering": steering})
    answer = await client.post(URL, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refused(client: httpx.AsyncClient, steering: Any, model: str = MODEL) -> tuple[int, str, str]:
    answer = await client.post(URL, json=chat() | {"model": model, "steering": steering})
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


@pytest.fixture
def stored(library: Library) -> Iterator[Library]:
    for name in ("one", "two", "three", "four"):
        store(library, name)
    for artifact in ("two", "three"):
        library.presets.create(f"preset-{artifact}", _spec(artifact))
    yield library


def _spec(*artifacts: str, **fields: Any) -> Any:
    return Spec.model_validate({"interventions": [{"artifact": name, **fields} for name in artifacts]})


async def test_order_default_model_preset_request(client: httpx.AsyncClient, stored: Library) -> None:
    stored.switches.set_default_spec(_spec("one"))
    answer = await ask(client, {"preset": "preset-three", "interventions": [{"artifact": "four"}]},
                       model=f"{MODEL}:preset-two")
    assert names(answer["steering"]) == [("default", "one@1"), ("model", "two@1"), ("preset", "three@1"),
                                         ("request", "four@1")]
    assert answer["steering"]["presets"] == {"model": "preset-two@1", "preset": "preset-three@1"}
    assert answer["model"] == f"{MODEL}:preset-two"


@pytest.mark.parametrize("strength", [None, 2, {"value": 0.5, "unit": "unit"}])
async def test_the_short_form_is_the_whole_spec(client: httpx.AsyncClient, stored: Library, strength: Any) -> None:
    """Same receipt, same program; also behind a preset, whose place in the order it keeps."""
    item = {"artifact": "one"} if strength is None else {"artifact": "one", "strength": strength}
    for rest in ({}, {"preset": "preset-two"}, {"default": "override"}):
        short = await ask(client, {**item, **rest})
        full = await ask(client, {"interventions": [item], **rest})
        assert short["steering"] == full["steering"] and short["choices"] == full["choices"]
        assert ("request", "one@1") in names(short["steering"])


async def test_errors_of_the_short_form_name_its_fields(client: httpx.AsyncClient, stored: Library) -> None:
    assert await refused(client, {"artifact": "nobody"}) == (404, "not_found", "steering.artifact")
    assert await refused(client, {"artifact": "one", "strength": {"kl": 1}}) == (
        409, "not_calibrated", "steering.strength")
    assert await refused(client, {"artifact": "one", "interventions": [{"artifact": "two"}]}) == (
        400, "invalid_spec", "steering")


async def test_default_inherit_override_none(client: httpx.AsyncClient, stored: Library) -> None:
    stored.switches.set_default_spec(_spec("one"))
    assert names((await ask(client))["steering"]) == [("default", "one@1")]
    override = await ask(client, {"default": "override", "interventions": [{"artifact": "two"}]})
    assert names(override["steering"]) == [("request", "two@1")]
    none = await ask(client, {"default": "none"})
    assert names(none["steering"]) == [] and none["choices"][0]["message"]["content"] == " good day"


async def test_default_none_contradicts_a_preset_in_the_model_name(client: httpx.AsyncClient, stored: Library) -> None:
    assert await refused(client, {"default": "none"}, f"{MODEL}:preset-two") == (
        400, "invalid_spec", "steering.default")


async def test_versions_and_aliases_are_resolved_at_each_request(client: httpx.AsyncClient, library: Library) -> None:
    store(library, "one")
    assert names((await ask(client, {"interventions": [{"artifact": "one"}]}))["steering"]) == [("request", "one@1")]
    store(library, "one", 2.0)
    library.set_alias("one", "production", 1)
    for ref, resolved in (("one", "one@1"), ("one@2", "one@2"), ("one@production", "one@1"), ("one@latest", "one@2")):
        answer = await ask(client, {"interventions": [{"artifact": ref}]})
        assert names(answer["steering"]) == [("request", resolved)]
    library.set_alias("one", "production", 2)
    answer = await ask(client, {"interventions": [{"artifact": "one@production"}]})
    assert names(answer["steering"]) == [("request", "one@2")]


async def test_equal_specs_share_a_compiled_program(client: httpx.AsyncClient, engine: ScriptedEngine,
                                                   stored: Library) -> None:
    for strength in (1, 1, 2):
        await ask(client, {"interventions": [{"artifact": "one", "strength": strength}]})
    first, second, third = (c.generation.program for c in engine.completions)
    assert first is second and first is not third


async def test_kill_switch(client: httpx.AsyncClient, engine: ScriptedEngine, stored: Library) -> None:
    stored.switches.set_default_spec(_spec("one"))
    assert (await client.put("/v1/admin/kill-switch", json={"on": True})).json()["on"] is True
    for body in ({"interventions": [{"artifact": "two"}]}, {"interventions": [{"artifact": "unknown"}]}, {}):
        answer = await ask(client, body, model=f"{MODEL}:preset-two")
        assert answer["steering"]["disabled"] is True and answer["steering"]["reason"]
        assert answer["steering"]["applied"] == []
        assert answer["choices"][0]["message"]["content"] == " good day"
    assert all(c.generation.program is None for c in engine.completions)
    off = (await client.put("/v1/admin/kill-switch", json={"on": False})).json()
    assert off.pop("turned")["by"] == "owner"
    assert off == {"on": False, "reason": None, "stored": True, "failure": None}
    assert names((await ask(client))["steering"]) == [("default", "one@1")]


class TestKillSwitchOfTheSettings:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"kill_switch": True})

    async def test_cannot_be_turned_off_over_http(self, client: httpx.AsyncClient, stored: Library) -> None:
        answer = await client.put("/v1/admin/kill-switch", json={"on": False})
        assert (answer.status_code, answer.json()["error"]["param"]) == (409, "on")
        found = await ask(client, {"interventions": [{"artifact": "two"}]})
        assert found["steering"]["disabled"] is True


class TestDefaultSpecOfTheSettings:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"default_spec": _spec("one")})

    async def test_acts_until_another_is_set(self, client: httpx.AsyncClient, stored: Library) -> None:
        assert names((await ask(client))["steering"]) == [("default", "one@1")]
        await client.put("/v1/admin/default-spec", json={"preset": "preset-two"})
        assert names((await ask(client))["steering"]) == [("default", "two@1")]
        await client.delete("/v1/admin/default-spec")
        assert names((await ask(client))["steering"]) == [("default", "one@1")]


async def test_an_unusable_default_spec_refuses_rather_than_serving_unsteered(
        client: httpx.AsyncClient, stored: Library) -> None:
    stored.switches.set_default_spec(_spec("one", "two"))
    stored.delete("two", force=True)
    code, kind, param = await refused(client, {})
    assert (code, kind, param) == (503, "default_spec_unusable", "default_spec.interventions[1].artifact")
    assert names((await ask(client, {"default": "none"}))["steering"]) == []


@pytest.mark.parametrize(("steering", "status", "code", "param"), [
    ({"interventions": [{"artifact": "one"}, {"artifact": "nil"}]}, 404, "not_found",
     "steering.interventions[1].artifact"),
    ({"interventions": [{"artifact": "one@9"}]}, 404, "not_found", "steering.interventions[0].artifact"),
    ({"preset": "nil"}, 404, "not_found", "steering.preset"),
    ({"interventions": [{"artifact": "one"}, {"artifact": "one", "layers": [77]}]}, 400, "layer_out_of_range",
     "steering.interventions[1].layers[0]"),
    ({"interventions": [{"artifact": "one", "op": "ablate"}]}, 409, "artifact_mismatch",
     "steering.interventions[0].op"),
    ({"interventions": [{"artifact": "one", "scope": {"prompt": {"positions": [500]}}}]}, 400, "invalid_spec",
     "steering.interventions[0].scope.prompt.positions"),
    ({"interventions": [{"artifact": "one"}] * 33}, 400, "invalid_spec", "steering.interventions"),
])
async def test_errors_name_the_field(client: httpx.AsyncClient, stored: Library, engine: ScriptedEngine,
                                     steering: Any, status: int, code: str, param: str) -> None:
    # The default spec comes first and must not shift the indices of the request.
    stored.switches.set_default_spec(_spec("three"))
    assert await refused(client, steering) == (status, code, param)
    assert engine.completions == []


async def test_a_faulty_preset_is_named_as_such(client: httpx.AsyncClient, stored: Library) -> None:
    stored.delete("two", force=True)
    answer = await client.post(URL, json=chat(steering={"preset": "preset-two"}))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (404, "steering.preset")
    assert "preset-two@1" in error["message"] and "'two'" in error["message"]


async def test_another_models_artifact_needs_an_override(client: httpx.AsyncClient, library: Library) -> None:
    store(library, "foreign", model_id="other", fingerprint="0" * 64)
    steering = {"interventions": [{"artifact": "foreign"}]}
    assert await refused(client, steering) == (409, "artifact_mismatch", "steering.interventions[0].artifact")
    answer = await ask(client, {"interventions": [{"artifact": "foreign", "override": ["model"]}]})
    assert names(answer["steering"]) == [("request", "foreign@1")]


async def test_receipt_sums_choices(client: httpx.AsyncClient, stored: Library) -> None:
    answer = await ask(client, {"interventions": [{"artifact": "one", "scope": {"generation": "none"}}],
                                "report": "tokens"}, n=3)
    [item] = answer["steering"]["applied"]
    length = answer["usage"]["prompt_tokens"]
    assert item["tokens"] == {"prompt": 3 * length, "generation": 0}
    assert [c["index"] for c in item["choices"]] == [0, 1, 2]
    assert all(c["positions"] == list(range(length)) for c in item["choices"])


async def test_zero_strength_is_stated_and_touches_nothing(client: httpx.AsyncClient, stored: Library) -> None:
    answer = await ask(client, {"interventions": [{"artifact": "one", "strength": 0}], "report": "tokens"})
    [item] = answer["steering"]["applied"]
    assert item["tokens"] == {"prompt": 0, "generation": 0} and item["choices"][0]["positions"] == []


class TestInlineLimit:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_inline_bytes": 32})

    async def test_is_that_of_the_settings(self, client: httpx.AsyncClient) -> None:
        fits = {"op": "add", "inline": {"vector": {"1": [1.0] * 8}}}
        over = {"op": "add", "inline": {"vector": {"1": [1.0] * 9}}}
        assert (await ask(client, {"interventions": [fits]}))["steering"]["applied"]
        assert await refused(client, {"interventions": [fits, over]}) == (
            413, "payload_too_large", "steering.interventions[1].inline")


async def test_models_lists_the_base_first_then_presets(client: httpx.AsyncClient, stored: Library) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == [MODEL, f"{MODEL}:preset-three", f"{MODEL}:preset-two"]
    for name in (MODEL, f"{MODEL}:preset-two", f"{MODEL}:preset-two@1"):
        assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
    for name in ("other", f"{MODEL}:nil", f"{MODEL}:../x"):
        answer = await client.get(f"/v1/models/{name}")
        assert 400 <= answer.status_code < 500

