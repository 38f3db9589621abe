"""Whose effects are told to whom, and by which arm of a roll-out: two tenants and two arms, counted by hand."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from pydantic import SecretStr

from server.engines.data import CompareRequest, Comparison
from server.settings import Settings
from steering.divergence import Divergence, ResidualShift
from tests.server.conftest import MODEL
from tests.server.scripted import ScriptedEngine
from tests.server.test_keys import OWNER, bearer, make
from tests.server.test_rollouts import Desk, still, stored, two_users  # noqa: F401
from tests.server.test_steering import _spec
from vectors.library import Library

EFFECTS = "/v1/effects"
NATS = {"old@1": 1.0, "new@1": 3.0}
# Answers by tenant and arm.
ASKED = {("acme", "stable"): 3, ("acme", "candidate"): 2, ("other", "stable"): 1, ("other", "candidate"): 4}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"),
                    shadow_sample=1.0, shadow_budget=10.0, outcome_sample=1.0)


class Asked(Desk):
    """Every answer is measured and graded. Those with the candidate's artifact are moved by 3 nats, others by 1."""

    def __init__(self, client: httpx.AsyncClient, app: FastAPI, engine: ScriptedEngine) -> None:
        super().__init__(client, app)
        engine.compare = self._compare  # type: ignore[method-assign]
        self.keys: dict[str, dict[str, str]] = {"owner": OWNER}

    async def prepare(self) -> str:
        """Ask as `ASKED` says of a roll-out that works on half of the users. Returns its id."""
        for tenant in ("acme", "other"):
            self.keys[tenant] = bearer(await make(self.client, name=tenant, tenant=tenant, roles=["infer", "metrics"]))
        made = await self.make(steps=[{"share": 0.5}])
        for (tenant, arm), count in ASKED.items():
            user = two_users(made["id"], 0.5, tenant)[arm == "candidate"]
            for _ in range(count):
                receipt = await self.ask(user, self.keys[tenant])
                assert [one["arm"] for one in receipt["rollouts"]] == [arm]
        return str(made["id"])

    async def told(self, who: str, **query: str) -> dict[str, list[dict[str, Any]]]:
        await self.app.state.server.shadow.drained()
        await self.app.state.server.live_grading.drained()
        answer = await self.client.get(EFFECTS, headers=self.keys[who], params=query)
        assert answer.status_code == 200, answer.text
        found: dict[str, list[dict[str, Any]]] = answer.json()
        return found

    async def _compare(self, request: CompareRequest) -> Comparison:
        count, artifact = len(request.token_ids) - request.prompt_length, request.program.compiled[0].applied.artifact
        rows = {one.name: torch.zeros(count) for one in fields(Divergence)}
        total = Divergence(**rows | {"kl": torch.full((count,), NATS[str(artifact)])})
        ones = torch.ones(count)
        return Comparison(total, (total,) * len(request.program.compiled), ResidualShift(ones, ones), exact=True)


@pytest.fixture
def asked(client: httpx.AsyncClient, app: FastAPI, engine: ScriptedEngine) -> Asked:
    return Asked(client, app, engine)


def by(name: str, found: Mapping[str, Any]) -> dict[str, tuple[int, float, int]]:
    """Completions, their mean dose, and how many answers were graded, by a field of the rows."""
    answers = {row.get(name): row["answers"] for row in found["outcomes"]}
    assert answers.keys() == {row.get(name) for row in found["data"]}
    return {row[name]: (row["completions"], round(row["kl_mean"], 6), answers[row[name]]) for row in found["data"]}


async def test_each_arm_has_its_sums_and_each_tenant_its_own(asked: Asked) -> None:
    rollout = await asked.prepare()
    for who, stable, candidate in (("owner", 4, 6), ("acme", 3, 2), ("other", 1, 4)):
        for query in ({"group": "arm"}, {"group": "arm", "rollout": rollout}):
            found = await asked.told(who, **query)
            assert {row["rollout"] for row in found["data"]} == {rollout}
            assert by("arm", found) == {"stable": (stable, 1.0, stable), "candidate": (candidate, 3.0, candidate)}, who
        mean = (stable * 1.0 + candidate * 3.0) / (stable + candidate)
        both = (stable + candidate, round(mean, 6), stable + candidate)
        whole = await asked.told(who, group="all", artifact="all")
        assert sum(row["completions"] for row in whole["data"]) == both[0]
        one = await asked.told(who, group="preset", rollout=rollout, arm="candidate")
        assert by("preset", one) == {"cheer@2": (candidate, 3.0, candidate)}
        tenants = by("tenant", await asked.told(who, group="tenant"))
        assert tenants == ({"acme": (5, 1.8, 5), "other": (5, 2.6, 5)} if who == "owner" else {who: both}), who
    # Who asks for another tenant's is told nothing, and the house is told whose it asks for.
    assert await asked.told("acme", tenant="other") == {"data": [], "outcomes": []}
    assert by("arm", await asked.told("owner", group="arm", tenant="other"))["candidate"] == (4, 3.0, 4)


async def test_what_belongs_to_no_arm_and_to_several(asked: Asked, library: Library) -> None:
    """The control names a version, so that no roll-out acts. With two roll-outs a completion counts once in each, and
    once in all."""
    first = await asked.prepare()
    library.presets.create("warm", _spec("old"))
    library.presets.set_alias("warm", "production", 1)
    library.presets.create("warm", _spec("new"))
    second = (await asked.make(target="warm@production", steps=[{"share": 1.0}]))["id"]
    for _ in range(3):
        assert (await asked.ask("ann", asked.keys["acme"], steering={"preset": "cheer@1"}))["rollouts"] == []
    receipt = await asked.ask("ann", asked.keys["acme"], model=f"{MODEL}:warm")
    arms = {one["rollout"]: one["arm"] for one in receipt["rollouts"]}
    assert set(arms) == {first, second} and arms[second] == "candidate"
    found = await asked.told("owner", group="arm")
    counts = {(row["rollout"], row["arm"]): row["completions"] for row in found["data"]}
    expected = {(first, "stable"): 4, (first, "candidate"): 6, (second, "candidate"): 1}
    expected[first, arms[first]] += 1
    assert counts == expected
    whole = await asked.told("owner", group="all", artifact="all")
    assert sum(row["completions"] for row in whole["data"]) == 10 + 3 + 1
    assert {row["artifact"] for row in whole["data"]} == {"all"}
    refused = await asked.client.get(EFFECTS, headers=OWNER, params={"arm": "stable"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "arm")


async def test_metrics_carry_the_arm(asked: Asked) -> None:
    rollout = await asked.prepare()
    await asked.told("owner")
    page = (await asked.client.get("/metrics", headers=OWNER)).text
    for arm, count in (("stable", 4), ("candidate", 6)):
        assert f'trimtab_rollout_dose_nats_count{{arm="{arm}",rollout="{rollout}"}} {count}.0' in page
        labels = f'arm="{arm}",grader="refusal",outcome="answered",rollout="{rollout}"'
        assert f"trimtab_rollout_answers_total{{{labels}}} {count}.0" in page
    assert f'trimtab_rollout_dose_nats_sum{{arm="candidate",rollout="{rollout}"}} 18.0' in page
    # They add up all tenants, so no key of one reads them.
    refused = await asked.client.get("/metrics", headers=asked.keys["acme"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_permitted")
