"""`trimtab verify` from its settings to the exit code."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from server.cli import app
from server.settings import load_settings
from server.verify import overhead, run
from server.verify.effect import Effect
from server.verify.exactness import Exact
from server.verify.overhead import Arm
from server.verify.report import LEAST_IDLE, Report

EXACT = Exact("add (plain) at resid_post[1]", "add", "resid_post", 1e-6, 0.5, 0.4, 0.6, 0.001)
SMALL = Exact("clamp (range) at attn_out[1]", "clamp", "attn_out", 0.02, 0.03, 0.4, 0.6, 0.25)
EFFECT = Effect(1, 3.0, 0.5, [0.1, 0.7], [(0.5, 0.5001), (0.1, 0.1)], "float32")
ARMS = {"stock": Arm(100, 1.0, 1.0, 1.0), "idle": Arm(90, 0.9, 0.5, 1.1)}
REPORT = Report({"model": "m", "family": "llama", "engine": "transformers", "device": "cpu", "dtype": "float32",
                 "threads": 1, "versions": {"torch": "2"}}, [EXACT], ARMS, EFFECT, 1.0)


async def test_the_whole_on_a_tiny_model(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the verdict on the time that it took, which is this machine's."""
    monkeypatch.setattr(overhead, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(overhead, "NEW_TOKENS", 4)
    monkeypatch.setattr(run, "OVERHEAD_S", 0.0)
    settings = load_settings(model=str(folder_of("qwen3")), kv_cache_tokens=8192, dtype="float32")
    said: list[str] = []
    report = await run.verify(settings, said.append)
    assert said and report.overhead is not None
    assert {name: good for name, good in report.verdicts.items() if name != "overhead"} == {
        "exactness": True, "controls": True, "effect": True}
    assert set(report.overhead) == {"stock", "stock again", "idle", "one program", "many programs"}
    assert len(report.effect.placebo) == 20 and report.effect.steered > 0
    assert json.loads(json.dumps(report.to_json()))["where"]["dtype"] == "float32"


@pytest.mark.parametrize(("change", "failed"), [
    ({}, None),
    ({"exactness": [EXACT, replace(EXACT, off=0.002)]}, "exactness"),
    ({"exactness": []}, "exactness"),
    ({"exactness": [EXACT, replace(EXACT, wrong_scope=1e-6)]}, "controls"),
    ({"exactness": [replace(EXACT, wrong_strength=0.0)]}, "controls"),
    ({"effect": replace(EFFECT, hooks=[(0.5, 0.6)])}, "effect"),
    ({"effect": replace(EFFECT, steered=0.0)}, "effect"),
    ({"overhead": {"idle": Arm(1, 0.1, 0.1, LEAST_IDLE - 0.01)}}, "overhead"),
    ({"overhead": None}, None),
])
def test_the_verdict_and_the_exit_code(change: dict[str, Any], failed: str | None, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    report = replace(REPORT, **change)
    assert [name for name, good in report.verdicts.items() if not good] == ([failed] if failed else [])
    if not report.exactness:
        return

    async def verified(settings: Any, said: Any, *, with_overhead: bool) -> Report:
        return report

    monkeypatch.setattr(run, "verify", verified)
    told = CliRunner().invoke(app, ["verify", "lab-dense", "--json", str(tmp_path / "report.json")])
    assert told.exit_code == (1 if failed else 0)
    assert (f"{failed} FAILS" if failed else "VERDICT") in told.output
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is (failed is None)


def test_in_half_precision_each_op_and_site_needs_one_case_that_shows() -> None:
    half = replace(REPORT, where=REPORT.where | {"dtype": "bfloat16"}, exactness=[EXACT, SMALL])
    assert not half.verdicts["controls"]
    seen = replace(SMALL, wrong_strength=0.3)
    assert replace(half, exactness=[EXACT, SMALL, seen]).verdicts["controls"]
    # In float32 nothing is rounded away that large.
    assert not replace(REPORT, exactness=[EXACT, SMALL, seen]).verdicts["controls"]


async def test_arms_take_turns_and_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the arms move: the machine gets slower from round to round, the ratio stays."""
    now, calls = [0.0], list[str]()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def arm(name: str, cost: float) -> Any:
        async def work(salt: int) -> None:
            calls.append(name)
            now[0] += cost * (1 + len(calls) // 2)

        return work

    found = await overhead.take_turns({"stock": arm("stock", 1.0), "idle": arm("idle", 1.0)}, 10, time.monotonic() - 1)
    assert calls == ["idle", "stock", "stock", "idle", "idle", "stock", "stock", "idle"]
    assert 0.5 < found["idle"].ratio < 2.0 and found["stock"].ratio == 1.0
    assert found["stock"].lowest == found["stock"].highest == 1.0


def test_prompts_of_a_round_are_its_own() -> None:
    first, second = (overhead.prompts_of(500, 3, 8, salt) for salt in (1, 2))
    assert first != second and [len(prompt) for prompt in first] == [8] * 3
    assert torch.tensor(first).max() < 500
