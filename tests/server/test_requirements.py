"""Aliases that require a passed evaluation: what moves them and what does not, however it is tried."""

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from trimtab_client import Client
from typer.testing import CliRunner

from server.cli.main import app as cli
from server.settings import Settings
from tests.server.conftest import MODEL
from tests.server.test_keys import OWNER, bearer, make
from tests.server.test_rollouts import ERRORS, Desk
from tests.server.test_steering import _spec, store
from vectors.library import Library

URL = "/v1/admin/requirements"
REFUSES = {"figure": "success", "grader": "refusal", "at_least": 0.8}
WHOLE = {"figure": "broken", "grader": "refusal", "at_most": 0.05}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"))


@pytest.fixture(autouse=True)
def stored(library: Library) -> Iterator[Library]:
    """cheer@production is version 1; version 2 names the artifact new."""
    store(library, "old")
    store(library, "new", 2.0)
    library.presets.create("cheer", _spec("old"))
    library.presets.set_alias("cheer", "production", 1)
    library.presets.create("cheer", _spec("new"))
    yield library


@pytest.fixture
def desk(client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr("server.rollouts.rollouts.POLL_S", 3600.0)
    return Desk(client, app)


def evaluated(library: Library, id: str, *, success: float = 0.9, broken: float = 0.0, days: float = 0.0,
              ref: str | None = "cheer@2", artifacts: Any = ("new@1",), fingerprint: str = "f" * 64, prompts: int = 50,
              dose: float = 1.0, chance: Any = (0.01,), mandatory: Any = ()) -> None:
    """Store an evaluation as the job does. Every argument differs in some case from what counts."""
    arm = {"success": [success], "broken": [broken], "chance": list(chance), "kl": 0.3}
    at = datetime.now(UTC) - timedelta(days=days)
    summary = {"id": id, "created_at": at.isoformat(), "model": MODEL, "fingerprint": fingerprint,
               "artifacts": list(artifacts), "preset": ref, "graders": ["refusal"], "prompts": prompts, "draws": 8,
               "mandatory": list(mandatory), "untouched": arm | {"dose": 0.0}, "results": [arm | {"dose": dose}]}
    library.evaluations.add(id, at, [*artifacts, *([ref] if ref else [])], summary, "{}")


async def require(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    body = {"target": "cheer", "bounds": [REFUSES, WHOLE], "prompts": 20, **more}
    answer = await client.put(URL, headers=OWNER, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def move(client: httpx.AsyncClient, version: int = 2) -> tuple[int, str]:
    answer = await client.put("/v1/presets/cheer/aliases/production", headers=OWNER, json={"version": version})
    return answer.status_code, "" if answer.status_code == 200 else answer.json()["error"]["code"] + ": " + (
        answer.json()["error"]["message"])


async def test_an_alias_moves_to_what_passed_and_to_nothing_else(client: httpx.AsyncClient, library: Library) -> None:
    await require(client)
    status, said = await move(client)
    assert status == 409 and said.startswith("evaluation_required: cheer@production requires a passed evaluation")
    evaluated(library, "eval-1", success=0.5)
    status, said = await move(client)
    assert status == 409
    assert "success by refusal of at least 0.8, and the evaluation eval-1 of cheer@2 found 0.5" in said
    evaluated(library, "eval-2", broken=0.2)
    assert "broken by refusal of at most 0.05, and the evaluation eval-2" in (await move(client))[1]
    evaluated(library, "eval-3")
    assert await move(client) == (200, "")
    assert library.presets.resolve("cheer").version == 2
    # Back is a move like any other, and version 1 was never evaluated.
    assert (await move(client, 1))[0] == 409
    # Other aliases are free.
    answer = await client.put("/v1/presets/cheer/aliases/canary", headers=OWNER, json={"version": 1})
    assert answer.status_code == 200


@pytest.mark.parametrize("other", [
    {"ref": "cheer@1"}, {"ref": None}, {"artifacts": ("old@1",)}, {"artifacts": ("new@1", "old@1")},
    {"fingerprint": "e" * 64}, {"prompts": 19}, {"dose": 2.0}, {"days": 31.0},
    {"mandatory": ("safety@1",)}], ids=str)
async def test_what_is_of_something_else_does_not_count(client: httpx.AsyncClient, library: Library, other: Any
                                                        ) -> None:
    await require(client, max_age_s=30 * 86400.0)
    evaluated(library, "eval-1", **other)
    assert (await move(client))[0] == 409
    evaluated(library, "eval-2", days=1.0)
    # At another dose it is of this version, and newer, so it decides; the rest is passed over.
    assert (await move(client))[0] == (409 if "dose" in other else 200)


async def test_the_newest_decides(client: httpx.AsyncClient, library: Library) -> None:
    await require(client)
    evaluated(library, "eval-1", days=1.0)
    evaluated(library, "eval-2", success=0.1)
    assert "eval-2" in (await move(client))[1]


async def test_an_artifact_that_moved_since_makes_it_another_version(
        client: httpx.AsyncClient, library: Library) -> None:
    """The preset names the artifact by its bare name, so what was evaluated is not what would be served."""
    await require(client)
    evaluated(library, "eval-1")
    store(library, "new", 3.0)
    assert (await move(client))[0] == 409
    evaluated(library, "eval-2", artifacts=("new@2",))
    assert await move(client) == (200, "")


async def test_figures_that_an_evaluation_lacks_are_not_taken_as_passed(
        client: httpx.AsyncClient, library: Library) -> None:
    await require(client, bounds=[{"figure": "chance", "grader": "refusal", "at_most": 0.05}])
    evaluated(library, "eval-1", chance=())
    assert "does not say it" in (await move(client))[1]
    evaluated(library, "eval-2", chance=(0.5,))
    assert "found 0.5" in (await move(client))[1]
    await require(client, bounds=[{"figure": "success", "grader": "language", "at_least": 0.1}])
    assert "does not say it" in (await move(client))[1]
    await require(client, bounds=[{"figure": "kl", "at_most": 0.5}])
    assert await move(client) == (200, "")


async def test_only_evaluations_of_a_named_tenant_may_count(client: httpx.AsyncClient, library: Library) -> None:
    await require(client, tenant="quality")
    evaluated(library, "eval-1")
    assert (await move(client))[0] == 409
    await require(client, tenant="default")
    assert await move(client) == (200, "")


async def test_there_is_no_way_around(desk: Desk, library: Library) -> None:
    """Removing the alias, so that the bare name means the newest version; deleting what it points at; rolling out."""
    client, preset = desk.client, "/v1/presets/cheer"
    await require(client)
    for answer in (await client.delete(f"{preset}/aliases/production", headers=OWNER),
                   await client.delete(f"{preset}@1", headers=OWNER, params={"force": "true"}),
                   await client.delete(preset, headers=OWNER, params={"force": "true"})):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict"), answer.text
    made = await desk.make(publish=False, rails=[ERRORS])
    assert await desk.refused(made["id"], "publish") == (409, "evaluation_required")
    evaluated(library, "eval-1", days=1.0)
    await desk.do(made["id"], "publish")
    # What is found out while it is rolled out counts at the end.
    evaluated(library, "eval-2", broken=0.5)
    assert await desk.refused(made["id"], "promote") == (409, "evaluation_required")
    assert (await desk.show(made["id"]))["status"] == "published" and library.presets.resolve("cheer").version == 1
    library.evaluations.delete("eval-2")
    await desk.do(made["id"], "promote")
    assert library.presets.resolve("cheer").version == 2
    # A key that may change the library may not change what is required of it.
    writer = await make(client, name="writer", tenant="default", roles=["library_write", "library_read", "jobs"])
    answer = await client.delete(URL, headers=bearer(writer), params={"target": "cheer"})
    assert answer.status_code == 403


async def test_a_roll_out_that_may_not_be_promoted_says_why_and_stays(desk: Desk, library: Library) -> None:
    made = await desk.make(rails=[ERRORS | {"samples": 1}], steps=[{"share": 0.5, "wait_s": 0}], then="promote")
    await require(desk.client)
    for arm in ("stable", "candidate"):
        desk.rollouts.sample(made["id"], arm, {0: 0.0})  # type: ignore[arg-type]
    await desk.rollouts.look()
    shown = await desk.show(made["id"])
    assert shown["status"] == "published" and "requires a passed evaluation" in shown["problem"]
    assert desk.rollouts.failure is None
    evaluated(library, "eval-1")
    await desk.rollouts.look()
    assert (await desk.show(made["id"]))["status"] == "production"


async def test_artifacts_are_held_too(client: httpx.AsyncClient, library: Library) -> None:
    library.set_alias("new", "production", 1)
    store(library, "new", 5.0)
    await require(client, collection="artifact", target="new@production")
    path = "/v1/artifacts/new/aliases/production"
    # Of a preset that uses it, it is not of it alone.
    evaluated(library, "eval-1", artifacts=("new@2",))
    assert (await client.put(path, headers=OWNER, json={"version": 2})).status_code == 409
    evaluated(library, "eval-2", ref=None, artifacts=("new@2",))
    assert (await client.put(path, headers=OWNER, json={"version": 2})).status_code == 200


@pytest.mark.parametrize("body", [
    {"bounds": []}, {"bounds": [{"figure": "success", "grader": "refusal"}]}, {"bounds": [{"figure": "success",
     "at_least": 0.1}]}, {"bounds": [{"figure": "kl", "grader": "refusal", "at_most": 1.0}]}, {"prompts": 0}], ids=str)
async def test_requirements_that_make_no_sense(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    answer = await client.put(URL, headers=OWNER, json={"target": "cheer", "bounds": [REFUSES], **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"], answer.text


async def test_what_is_not_there_requires_nothing(client: httpx.AsyncClient) -> None:
    for target in ("cheer@canary", "nobody"):
        answer = await client.put(URL, headers=OWNER, json={"target": target, "bounds": [REFUSES]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        answer = await client.delete(URL, headers=OWNER, params={"target": target})
        assert answer.status_code == 404


async def test_the_command_line_and_the_client(address: str, tmp_path: Path) -> None:
    """With the bounds that docs/rollouts.md prints."""
    page = (Path(__file__).parents[2] / "docs/rollouts.md").read_text()
    bounds = tmp_path / "bounds.json"
    bounds.write_text(page.split("```json\n")[2].split("```")[0])

    def run(*words: str) -> str:
        result = CliRunner().invoke(cli, ["requirements", *words, "--url", address, "--api-key", "owner-s-key"])
        assert result.exit_code == 0, result.output
        return result.output

    def work() -> None:
        assert '"target": "cheer@production"' in run("set", "cheer@production", str(bounds))
        assert re.search('"figure": "success"', run("list"))
        with Client(address, api_key="owner-s-key") as client:
            held, = client.requirements()
            assert held.bounds[0]["figure"] == json.loads(bounds.read_text())["bounds"][0]["figure"]
            assert client.set_requirement("cheer", [REFUSES], prompts=3).prompts == 3
        assert "requires nothing any more" in run("delete", "cheer")

    await asyncio.to_thread(work)
