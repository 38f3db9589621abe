"""Policies: what a tenant's requests may ask of steering, whichever way they ask."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import SecretStr
from trimtab_client import Client
from typer.testing import CliRunner

from server.background.job import FINISHED
from server.cli.main import app as cli
from server.engines.data import CompareRequest, Comparison
from server.identity.policy import Held, Policy, matches
from server.identity.principal import CURRENT, Principal
from server.requests.planner import Planner
from server.settings import Settings
from steering.artifacts.payload import Payload
from steering.divergence import Divergence, ResidualShift
from steering.language.errors import TrimtabError
from steering.language.spec import Spec, Steering
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_keys import OWNER, bearer, code, make
from tests.server.test_planner import calibration
from tests.server.test_steering import _spec, store
from vectors.artifact import Metadata
from vectors.library import Library

URL = "/v1/chat/completions"
NORM = 4.0
INLINE = {"op": "add", "layers": [2], "site": "resid_post", "inline": {"vector": [1.0] * 8}}
# Rules are asked before it is looked up whether there is such a source.
PATCH = {"interventions": [{"op": "patch", "options": {"source": "act-" + "0" * 24, "row": 0},
                            "scope": {"prompt": "all", "generation": "none"}}]}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"))


@pytest.fixture
def stored(library: Library) -> Iterator[Library]:
    """team-a and team-b have a norm on record, bare has none; the length of each vector is sqrt(8)."""
    for name in ("team-a", "team-b", "secret"):
        store(library, name, residual_norm={2: NORM})
    store(library, "bare")
    library.create(Metadata(name="cut", kind="vector", op="ablate", site="resid_post"),
                   Payload.build("vector", {2: {"vector": torch.ones(8)}}))
    library.presets.create("team-mild", _spec("team-a"))
    library.presets.create("other", _spec("secret"))
    library.presets.create("team-strong", _spec("team-a", strength=9))
    yield library


class Asked:
    """A key of the tenant `team`, and what its requests come to under a policy."""

    def __init__(self, client: httpx.AsyncClient, key: dict[str, Any]) -> None:
        self.client, self.key = client, key

    async def policy(self, key_id: str | None = None, **rules: Any) -> None:
        answer = await self.client.put("/v1/admin/policies/team", headers=OWNER, json=rules,
                                       params={} if key_id is None else {"key_id": key_id})
        assert answer.status_code == 200, answer.text

    async def ask(self, steering: Any = None, model: str = MODEL) -> httpx.Response:
        body = chat() | {"model": model} | ({} if steering is None else {"steering": steering})
        return await self.client.post(URL, headers=bearer(self.key), json=body)

    async def applied(self, steering: Any = None, model: str = MODEL) -> dict[str, Any]:
        answer = await self.ask(steering, model)
        assert answer.status_code == 200, answer.text
        receipt: dict[str, Any] = answer.json()["steering"]
        return receipt

    async def rule(self, steering: Any, model: str = MODEL) -> tuple[str, str]:
        """The rule that a refusal names, and the field."""
        answer = await self.ask(steering, model)
        assert code(answer) == (403, "policy_violation"), answer.text
        error = answer.json()["error"]
        return error["message"].partition("by its rule ")[2].partition(":")[0], error["param"]


@pytest.fixture
async def team(client: httpx.AsyncClient, stored: Library) -> Asked:
    return Asked(client, await make(client, "infer", "infer_raw", "library_read", tenant="team"))


def steps(*artifacts: str, **fields: Any) -> dict[str, Any]:
    return {"interventions": [{"artifact": name, **fields} for name in artifacts]}


async def test_each_rule_refuses_by_its_name_and_lets_the_rest_pass(team: Asked) -> None:
    first = "steering.interventions[0]"
    for rules, good, bad, rule, param in (
            ({"artifacts": ["team-*"]}, steps("team-a"), steps("secret"), "artifacts", f"{first}.artifact"),
            ({"artifacts": ["team-*"]}, {"preset": "team-mild"}, {"preset": "other"}, "artifacts",
             "steering.preset"),
            ({"artifacts": ["team-a@2"]}, None, steps("team-a"), "artifacts", f"{first}.artifact"),
            ({"presets": ["team-*"]}, {"preset": "team-mild"}, {"preset": "other"}, "presets", "steering.preset"),
            ({"ops": ["add"]}, steps("team-a"), steps("cut"), "ops", f"{first}.op"),
            ({"sites": ["resid_post"]}, steps("team-a"), steps("team-a", site="resid_pre", override=["site"]), "sites",
             f"{first}.site"),
            ({"most_interventions": 1}, steps("team-a"), steps("team-a", "team-b"), "most_interventions",
             "steering.interventions[1]"),
            ({"most_interventions": 1}, {"preset": "team-mild"}, {"preset": "team-mild", **steps("team-b")},
             "most_interventions", first),
            ({"raw_vectors": False}, steps("team-a"), {"interventions": [INLINE]}, "raw_vectors", f"{first}.inline"),
            ({"reports": False}, steps("team-a"), {**steps("team-a"), "report": "summary"}, "reports",
             "steering.report"),
            ({"raw_vectors": False}, steps("team-a"), PATCH, "raw_vectors", f"{first}.options.source"),
            ({"captures": False}, steps("team-a"), PATCH, "captures", f"{first}.options.source"),
            ({"captures": False}, steps("team-a"), {"monitor": ["team-a"]}, "captures", "steering.monitor"),
            ({"artifacts": ["team-*"]}, {"monitor": ["team-a"]}, {"monitor": ["secret"]}, "artifacts",
             "steering.monitor[0]"),
            # The length of the vector is sqrt(8), and 8 ** 0.5 / 4 about 0.707.
            ({"most_rel": 0.8}, steps("team-a"), steps("team-a", strength=2), "most_rel", first),
            ({"most_rel": 0.8}, steps("team-a"), steps("team-a", "team-b"), "most_rel", first),
            ({"most_rel": 0.8}, steps("team-a"), {"preset": "team-strong"}, "most_rel", "steering.preset"),
            ({"most_rel": 0.8}, steps("team-a"), {"interventions": [INLINE]}, "most_rel", first),
            ({"most_rel": 0.8}, steps("team-a"), steps("bare"), "most_rel", first),
            ({"most_rel": 0.8}, steps("team-a"), steps("cut"), "most_rel", f"{first}.op"),
            ({"most_rel": 0.8, "ops": ["ablate"]}, steps("cut"), steps("cut", strength=3), "most_rel", first)):
        await team.policy(**rules)
        if good is not None:
            await team.applied(good)
        assert await team.rule(bad) == (rule, param), (rules, bad)
    await team.policy()
    await team.applied({"interventions": [INLINE, {"artifact": "secret"}]})


async def test_both_specs_of_a_contrast_are_looked_at(team: Asked, engine: ScriptedEngine) -> None:
    engine.features = frozenset({"contrast"})
    weak = "steering.contrast.weak"
    for rules, good, bad, rule, param in (
            ({"artifacts": ["team-*"]}, steps("team-a"), steps("secret"), "artifacts", "interventions[0].artifact"),
            ({"presets": ["team-*"]}, {"preset": "team-mild"}, {"preset": "other"}, "presets", "preset"),
            ({"ops": ["add"]}, {"artifact": "team-a"}, {"artifact": "cut"}, "ops", "op"),
            ({"most_interventions": 1}, steps("team-a"), steps("team-a", "team-b"), "most_interventions",
             "interventions[1]"),
            ({"raw_vectors": False}, steps("team-a"), {"interventions": [INLINE]}, "raw_vectors",
             "interventions[0].inline")):
        await team.policy(**rules)
        await team.applied({"contrast": {"weak": good}})
        assert await team.rule({"contrast": {"weak": bad}}) == (rule, f"{weak}.{param}"), (rules, bad)
    # It amplifies, so its strength cannot be compared with a ceiling.
    for ceiling in ({"most_rel": 5.0}, {"most_nats": 5.0}):
        await team.policy(**ceiling)
        assert await team.rule({"contrast": {"weak": {}}, **steps("team-a")}) == (
            next(iter(ceiling)), "steering.contrast")
    await team.policy(mandatory={"interventions": [{"artifact": "team-b"}]})
    told = await team.applied({"contrast": {"weak": {}}, **steps("team-a")})
    assert [one["artifact"] for one in told["applied"]] == ["team-b@1", "team-a@1"]
    assert [one["artifact"] for one in told["contrast"]["weak"]] == ["team-b@1"]


async def test_models_and_presets_as_models(team: Asked) -> None:
    await team.policy(models=["other-*"])
    assert await team.rule(None) == ("models", "model")
    await team.policy(presets=["team-mild"])
    assert (await team.applied(model=f"{MODEL}:team-mild"))["presets"] == {"model": "team-mild@1"}
    assert await team.rule(None, model=f"{MODEL}:other") == ("presets", "model")
    # A refusal is the same whether there is such a preset or not.
    assert await team.rule(None, model=f"{MODEL}:nothing") == ("presets", "model")
    await team.policy(artifacts=["team-a"])
    assert await team.rule(steps("secret")) == await team.rule(steps("nothing"))


async def test_nats_where_an_artifact_is_calibrated(team: Asked, stored: Library) -> None:
    stored.add_calibration("team-a", [calibration(0.5, 1.0, 2.0)])
    await team.policy(most_nats=0.6)
    await team.applied(steps("team-a", strength=1))
    assert await team.rule(steps("team-a", strength=2)) == ("most_nats", "steering.interventions[0]")
    assert await team.rule(steps("team-b", strength=1)) == ("most_nats", "steering.interventions[0]")
    await team.policy(most_nats=0.6, over="clip")
    found = await team.applied(steps("team-a", strength=2))
    assert 0 < found["applied"][0]["strength"]["scale"]["2"] < 2
    # Without a calibration it is held to the relative norm, where that has a ceiling.
    await team.policy(most_nats=0.6, most_rel=0.8)
    await team.applied(steps("team-b", strength=1))
    assert await team.rule(steps("team-b", strength=2)) == ("most_rel", "steering.interventions[0]")


async def test_what_is_clipped_is_said_and_is_what_acts(team: Asked) -> None:
    await team.policy(most_rel=0.5, over="clip")
    found = await team.applied(steps("team-a", "team-b", strength=3))
    # Both are lowered by the same factor, to a sum of half the norm: 0.5 * 4 / (2 * 8 ** 0.5) each.
    for item in found["applied"]:
        assert item["strength"]["value"] == 3
        assert item["strength"]["scale"]["2"] == pytest.approx(0.5 * NORM / (2 * 8 ** 0.5), rel=1e-3)
    assert [(one["code"], one["intervention"]) for one in found["warnings"]] == [("policy", 0), ("policy", 1)]
    assert "most_rel" in found["warnings"][0]["message"] and "tenant team" in found["warnings"][0]["message"]
    # The control: under the ceiling nothing is lowered, and nothing said.
    small = await team.applied(steps("team-a", strength=0.5))
    assert small["applied"][0]["strength"]["scale"]["2"] == 0.5 and small["warnings"] == []


async def test_a_mandatory_spec_acts_first_and_cannot_be_dropped(team: Asked, stored: Library) -> None:
    stored.switches.set_default_spec(_spec("bare"))
    mandatory = {"interventions": [{"artifact": "secret", "strength": 9}]}
    await team.policy(mandatory=mandatory, artifacts=["team-*"], most_rel=0.8, most_interventions=1)

    def acts(found: dict[str, Any]) -> list[tuple[str, str]]:
        return [(item["source"], item["artifact"]) for item in found["applied"]]

    first = ("policy", "secret@1")
    assert acts(await team.applied()) == [first, ("default", "bare@1")]
    assert acts(await team.applied({"default": "none"})) == [first]
    assert acts(await team.applied({"default": "override", **steps("team-a")})) == [first, ("request", "team-a@1")]
    assert acts(await team.applied(model=f"{MODEL}:team-mild")) == [first, ("default", "bare@1"),
                                                                   ("model", "team-a@1")]
    assert await team.rule(steps("secret")) == ("artifacts", "steering.interventions[0].artifact")
    # It is used, so it cannot be deleted without force.
    stored.presets.delete("other")
    answer = await team.client.delete("/v1/artifacts/secret", headers=OWNER)
    assert code(answer) == (409, "conflict") and "policy of tenant team" in answer.json()["error"]["message"]
    await team.client.delete("/v1/artifacts/secret?force=true", headers=OWNER)
    assert code(await team.ask({"default": "none"})) == (503, "default_spec_unusable")


async def test_tenant_and_key_both_hold_and_others_are_free(team: Asked) -> None:
    await team.policy(artifacts=["team-*"])
    await team.policy(team.key["id"], artifacts=["team-b", "secret"])
    await team.applied(steps("team-b"))
    for name in ("team-a", "secret"):
        assert (await team.rule(steps(name)))[0] == "artifacts"
    other = Asked(team.client, await make(team.client, "infer", name="b", tenant="other"))
    sibling = Asked(team.client, await make(team.client, "infer", name="c", tenant="team"))
    await other.applied(steps("secret"))
    await sibling.applied(steps("team-a"))
    assert (await sibling.rule(steps("secret")))[0] == "artifacts"
    gone = await team.client.delete("/v1/admin/policies/team", headers=OWNER)
    assert gone.status_code == 204
    await sibling.applied(steps("secret"))
    assert code(await team.client.delete("/v1/admin/policies/team", headers=OWNER)) == (404, "not_found")
    # With the key goes its policy.
    await team.client.delete(f"/v1/admin/keys/{team.key['id']}", headers=OWNER)
    assert (await team.client.get("/v1/admin/policies", headers=OWNER)).json()["data"] == []


async def test_every_way_in_passes_the_gate(team: Asked) -> None:
    await team.policy(artifacts=["team-*"], captures=False)
    headers, steering = bearer(team.key), steps("secret")
    for path, body in (
            ("/v1/completions", {"prompt": "hi", "max_tokens": 4}),
            ("/v1/responses", {"input": "hi", "max_output_tokens": 4}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stream": True})):
        asked = {"model": MODEL, "steering": steering, **body}
        answer = await team.client.post(path, headers=headers, json=asked)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "policy_violation", (path, answer.text)
        asked["steering"] = steps("team-a")
        assert (await team.client.post(path, headers=headers, json=asked)).status_code == 200, path
    lens = await team.client.post("/v1/lens", headers=headers, json={"model": MODEL, "input": "hi"})
    assert code(lens) == (403, "policy_violation")
    features = await team.client.post("/v1/features", headers=headers, json={
        "model": MODEL, "input": "hi", "artifact": "any"})
    assert code(features) == (403, "policy_violation")
    worker = await make(team.client, "jobs", "library_write", name="worker", tenant="team")
    capture = {"model": MODEL, "input": ["hi"], "sites": {"resid_post": [1]}}
    assert code(await team.client.post("/v1/activations", headers=bearer(worker), json=capture)) == (
        403, "policy_violation")
    await team.policy(artifacts=["team-*"])
    answer = await team.client.post("/v1/activations", headers=bearer(worker), json={**capture, "steering": steering})
    assert code(answer) == (403, "policy_violation")
    capture["steering"] = steps("team-a")
    assert (await team.client.post("/v1/activations", headers=bearer(worker), json=capture)).status_code == 202
    await team.policy(artifacts=["team-*"], captures=False)
    evaluation = {"prompts": ["a"], "graders": [{"kind": "whole"}], "draws": 0}
    for given_ in ({"spec": steering}, {"preset": "other"}):
        answer = await team.client.post("/v1/evaluations", headers=bearer(worker), json=evaluation | given_)
        assert code(answer) == (403, "policy_violation"), answer.text
    preset = await team.client.post("/v1/presets", headers=bearer(worker), json={"name": "team/p", "spec": steering})
    assert code(preset) == (403, "policy_violation")


async def test_jobs_are_held_to_the_policy(team: Asked, stored: Library) -> None:
    worker = bearer(await make(team.client, "jobs", "library_write", "library_read", name="worker", tenant="team"))
    store(stored, "team/mine")
    pairs = [{"positive": f"good {n}", "negative": f"bad {n}"} for n in range(4)]
    made = {"name": "team/new", "site": "resid_post", "pairs": pairs}
    jobs = {"extract": ("/v1/extract", made), "method": ("/v1/extract/pca_pairwise", made),
            "tune": ("/v1/artifacts/team/mine/tune", {}),
            "calibrate": ("/v1/artifacts/team/mine/calibrate", {"prompts": ["a"] * 8}),
            "evaluate": ("/v1/evaluations", {"spec": steps("team/mine"), "prompts": ["a"], "draws": 0,
                                             "graders": [{"kind": "whole"}]})}

    async def refused(what: str) -> str | None:
        path, body = jobs[what]
        answer = await team.client.post(path, headers=worker, json=body)
        error = answer.json().get("error") or {}
        if error.get("code") != "policy_violation":
            return None
        told: str = error["message"]
        return told.partition("by its rule ")[2].partition(":")[0]

    every = set(jobs)
    for rules, rule, found in (
            ({}, None, set()), ({"models": ["other"]}, "models", every),
            ({"mandatory": steps("secret")}, "mandatory", every - {"evaluate"}),
            ({"artifacts": ["other"]}, "artifacts", every),
            ({"ops": ["ablate"]}, "ops", every), ({"sites": ["resid_pre"]}, "sites", every),
            ({"captures": False}, "captures", {"extract", "method"})):
        await team.policy(**rules)
        expected = {what: rule if what in found else None for what in jobs}
        assert {what: await refused(what) for what in jobs} == expected, rules


async def test_an_evaluation_runs_with_the_mandatory_spec_in_every_arm(team: Asked, engine: ScriptedEngine,
                                                                      stored: Library) -> None:
    """Also in the one without the evaluated spec, and the report says so. The control has no such policy."""
    store(stored, "team/mine")
    worker = bearer(await make(team.client, "jobs", "library_read", name="worker", tenant="team"))

    async def compare(request: CompareRequest) -> Comparison:
        count = len(request.token_ids) - request.prompt_length
        one = Divergence(**{each.name: torch.zeros(count) for each in fields(Divergence)})
        ones = torch.ones(count)
        return Comparison(one, (one,) * len(request.program.compiled), ResidualShift(ones, ones), exact=True)

    engine.compare = compare  # type: ignore[method-assign]

    async def evaluated() -> tuple[dict[str, Any], set[tuple[str, ...]]]:
        """The report, and what acted in each arm."""
        engine.completions.clear()
        job = (await team.client.post("/v1/evaluations", headers=worker, json={
            "spec": steps("team/mine"), "prompts": ["a", "b"], "draws": 0, "doses": [0.5, 1.0], "max_tokens": 4,
            "graders": [{"kind": "whole"}]})).json()
        async with asyncio.timeout(60):
            while job["status"] not in FINISHED:
                await asyncio.sleep(0.01)
                job = (await team.client.get(f"/v1/jobs/{job['id']}", headers=worker)).json()
        assert job["status"] == "succeeded", job
        report = (await team.client.get(f"/v1/evaluations/{job['result']['id']}", headers=worker)).json()
        assert report["mandatory"] == job["result"]["mandatory"]
        page = (await team.client.get(f"/v1/evaluations/{job['result']['id']}/report", headers=worker)).text
        assert ("acted in front of" in page) == bool(report["mandatory"])
        return report, {() if one.generation.program is None else tuple(
            str(item.applied.artifact) for item in one.generation.program.compiled) for one in engine.completions}

    await team.policy(mandatory=steps("secret"))
    report, arms = await evaluated()
    assert report["mandatory"] == ["secret@1"] and report["artifacts"] == ["team/mine@1"]
    assert arms == {("secret@1",), ("secret@1", "team/mine@1")}
    assert "with the mandatory spec alone" in report["results"][0]["verdict"][0]
    await team.policy()
    report, arms = await evaluated()
    assert report["mandatory"] == [] and arms == {(), ("team/mine@1",)}
    assert "untouched" in report["results"][0]["verdict"][0]


async def test_lines_of_a_batch_are_held_to_the_policy_of_the_moment(team: Asked) -> None:
    lines = [{"custom_id": name, "method": "POST", "url": URL, "body": chat(steering=steps(name))}
             for name in ("team-a", "secret")]
    await team.policy(artifacts=["team-*"])
    headers = bearer(team.key)
    file = await team.client.post("/v1/files", headers=headers, data={"purpose": "batch"},
                                  files={"file": ("a.jsonl", "\n".join(map(json.dumps, lines)).encode())})
    batch = (await team.client.post("/v1/batches", headers=headers, json={
        "input_file_id": file.json()["id"], "endpoint": URL, "completion_window": "24h"})).json()
    async with asyncio.timeout(60):
        while batch["status"] != "completed":
            await asyncio.sleep(0.02)
            batch = (await team.client.get(f"/v1/batches/{batch['id']}", headers=headers)).json()
    found = {}
    for id in (batch["output_file_id"], batch["error_file_id"]):
        content = (await team.client.get(f"/v1/files/{id}/content", headers=headers)).text
        found |= {(one := json.loads(line))["custom_id"]: one["response"]["status_code"]
                  for line in content.splitlines()}
    assert found == {"team-a": 200, "secret": 403}


async def test_a_weakened_step_stays_lowered(team: Asked, app: FastAPI) -> None:
    """A guard multiplies what the policy left, and does not take its place."""
    planner: Planner = app.state.server.planner
    held = Held("tenant team", Policy(most_rel=0.5, over="clip"))
    with who(held):
        plan = planner.plan(Steering.model_validate(steps("team-a", strength=3)), None)
    weaker = planner.weakened(plan, (), [0.5])
    assert float(weaker.compiled[0].rows["resid_post", 2].tensors["delta"].norm()) == pytest.approx(
        0.5 * 0.5 * NORM, rel=1e-3)


async def test_policies_that_cannot_be(team: Asked) -> None:
    for wrong in ({"artifacts": ["a b"]}, {"most_rel": 0}, {"most_rel": "1"}, {"over": "warn"}, {"unknown": 1},
                  {"most_interventions": -1}, {"ops": ["fly"]}):
        answer = await team.client.put("/v1/admin/policies/team", headers=OWNER, json=wrong)
        assert answer.status_code == 400, wrong
    missing = {"mandatory": steps("nothing")}
    assert code(await team.client.put("/v1/admin/policies/team", headers=OWNER, json=missing)) == (404, "not_found")
    assert code(await team.client.put("/v1/admin/policies/team?key_id=none", headers=OWNER, json={})) == (
        404, "not_found")
    assert (await team.client.get("/v1/admin/policies", headers=OWNER)).json()["data"] == []


def test_patterns() -> None:
    for name, version, pattern, expected in (
            ("calm", None, "calm", True), ("calm", None, "c*", True), ("calm", None, "C*", False),
            ("calm", None, "cal?", True), ("calm", None, "calm@2", True), ("calm", "2", "calm@2", True),
            ("calm", "1", "calm@2", False), ("calm", "1", "calm@*", True), ("team/calm", None, "team/*", True),
            ("teams/calm", None, "team/*", False), ("calm", None, "", False)):
        assert matches(name, [pattern], version) is expected, (name, version, pattern)
    assert not matches("calm", [])


@contextlib.contextmanager
def who(*held: Held) -> Iterator[None]:
    roles: Any = frozenset({"infer", "infer_raw"})
    token = CURRENT.set(Principal("k", "team", roles, "id", held))
    try:
        yield
    finally:
        CURRENT.reset(token)


STRENGTHS = st.one_of(st.none(), st.floats(-20, 20), st.fixed_dictionaries({
    "value": st.floats(-5, 5), "unit": st.sampled_from(["raw", "unit", "rel"])}))
STEPS = st.one_of(
    st.fixed_dictionaries({"artifact": st.sampled_from(["team-a", "team-b", "secret", "bare", "cut", "team-a@1"]),
                           "strength": STRENGTHS}),
    st.fixed_dictionaries({"artifact": st.just("team-a"), "strength": st.floats(-3, 3), "options": st.sampled_from(
        [{"norm_match": True}, {"preserve_norm": True}])}),
    st.just(INLINE))
BODIES = st.fixed_dictionaries({"interventions": st.lists(STEPS, max_size=4),
                                "preset": st.sampled_from([None, "team-mild", "team-strong", "other"]),
                                "default": st.sampled_from(["inherit", "none", "override"]),
                                "report": st.sampled_from(["none", "summary"])})
POLICIES = st.builds(
    lambda **rules: {name: value for name, value in rules.items() if value is not None},
    artifacts=st.sampled_from([None, ["team-*"], ["team-a", "cut"], []]), presets=st.sampled_from([None, ["team-*"]]),
    ops=st.sampled_from([None, ["add"], ["add", "ablate"]]), most_interventions=st.sampled_from([None, 0, 1, 2]),
    raw_vectors=st.booleans(), reports=st.booleans(), most_rel=st.sampled_from([None, 0.3, 1.0]),
    over=st.sampled_from(["refuse", "clip"]),
    mandatory=st.sampled_from([None, {"interventions": [{"artifact": "secret", "strength": 5}]}]))


async def test_whatever_is_asked_no_planned_program_breaks_the_policy(
        client: httpx.AsyncClient, app: FastAPI, stored: Library) -> None:
    planner: Planner = app.state.server.planner
    stored.switches.set_default_spec(_spec("bare", strength=30))
    planned = 0

    @examples(max_examples=150, deadline=None, database=None, derandomize=True,
              suppress_health_check=[HealthCheck.too_slow])
    @given(BODIES, POLICIES, POLICIES, st.sampled_from([None, "team-mild", "other"]))
    def check(body: dict[str, Any], first: dict[str, Any], second: dict[str, Any], model: str | None) -> None:
        nonlocal planned
        held = [Held("tenant team", Policy.model_validate(first)), Held("key k", Policy.model_validate(second))]
        try:
            steering = Steering.model_validate(body)
        except ValueError:
            return
        with who(*held):
            try:
                plan = planner.plan(steering, model)
            except TrimtabError:
                return
        planned += 1
        compiled = () if plan.program is None else plan.program.compiled
        mandatory = [one.policy.mandatory for one in held if one.policy.mandatory is not None]
        assert [item.origin for item in plan.planned[:len(mandatory)]] == ["policy"] * len(mandatory)
        asked = [(item, made) for item, made in zip(plan.planned, compiled, strict=True)
                 if item.origin in ("model", "preset", "request")]
        for one in held:
            rules = one.policy
            assert rules.reports or plan.report == "none"
            assert rules.most_interventions is None or len(asked) <= rules.most_interventions
            moved = 0.0
            for item, made in asked:
                name = (made.applied.artifact or "").partition("@")[0]
                assert rules.raw_vectors or name or item.preset is not None
                if rules.artifacts is not None and name:
                    assert any(name == p or (p.endswith("*") and name.startswith(p[:-1])) for p in rules.artifacts)
                assert rules.ops is None or made.op in rules.ops
                assert rules.presets is None or item.preset is None or item.preset.startswith("team-")
                for row in made.rows.values():
                    if made.op == "add":
                        share = float(row.tensors["delta"].norm()) / (1 if "norm_match" in row.kernel else NORM)
                        moved += share
                        assert rules.most_rel is None or name in ("team-a", "team-b", "secret")
                    elif rules.most_rel is not None:
                        assert abs(made.applied.strength["scale"]["2"]) <= 1.001
            assert rules.most_rel is None or moved <= rules.most_rel * 1.001

    check()
    assert planned >= 10, "the control: some requests do get through"


async def test_the_command_line_and_the_client(address: str, stored: Library, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(cli, ["policies", *words, "--url", address, "--api-key", "owner-s-key"])
        assert done.exit_code == 0, done.output
        return done.output

    def work() -> None:
        file = tmp_path / "policy.json"
        file.write_text(json.dumps({"artifacts": ["team-*"], "mandatory": steps("secret")}))
        run("set", "team", str(file))
        assert "team-*" in run("list")
        with Client(address, api_key="owner-s-key") as client:
            (found,) = client.policies()
            assert (found.tenant, found.key_id, found.policy["artifacts"]) == ("team", None, ["team-*"])
            made = client.create_key("a", roles=["infer"], tenant="team")
            assert client.set_policy("team", {"reports": False}, key_id=made.id).key_id == made.id
            client.delete_policy("team", key_id=made.id)
        run("delete", "team")
        with Client(address, api_key="owner-s-key") as client:
            assert client.policies() == []
            assert [one.action for one in client.audit(action="policy").data] == [
                "policy.delete", "policy.delete", "policy.set", "policy.set"]

    await asyncio.to_thread(work)


def test_a_policy_of_another_version_lets_nobody_past(library: Library) -> None:
    from server.identity.keys import policy_of
    from vectors.storage_errors import LibraryUnavailable

    library.policies.set("team", "", {"rule_of_the_future": True})
    with pytest.raises(LibraryUnavailable, match="cannot be read"):
        policy_of(library.policies.all()[0])


def test_a_stored_policy_reads_back_the_same() -> None:
    spec = Spec.model_validate({"interventions": [{"artifact": "a", "strength": 2}, {"artifact": "b"}]})
    policy = Policy(mandatory=spec, most_rel=0.5, ops=["add"])
    again = Policy.model_validate(policy.model_dump(mode="json", exclude_unset=True))
    assert again == policy
