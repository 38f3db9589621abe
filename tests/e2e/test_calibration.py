"""Calibration of a vector on the served model, as a user does it: the job, the card, the picture, then doses."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trimtab_client import Client, Conflict, NotFound
from typer.testing import CliRunner, Result

from server.cli import app

pytestmark = pytest.mark.slow
PROMPTS = [f"Review: I visited the {place} on {day}." for place in ("museum", "castle", "park", "market")
           for day in ("Monday", "Friday")]
WIDTH = 128
QUICK = {"points": 4, "draws": 2, "max_tokens": 6}


@pytest.fixture(scope="module")
def client(lab_url: str) -> Iterator[Client]:
    with Client(lab_url) as made:
        yield made


@pytest.fixture
def typed(lab_url: str) -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(app, list(words), env={"TRIMTAB_URL": lab_url, "COLUMNS": "200"})


@pytest.fixture(scope="module")
def ref(client: Client) -> str:
    stored = client.create_artifact({"name": "to-calibrate", "kind": "vector", "op": "add", "site": "resid_post"},
                                    {2: {"vector": [float((7 * i) % 13 - 6) for i in range(WIDTH)]}})
    with pytest.raises(NotFound, match="has no calibration"):
        client.calibration(stored.ref)
    return stored.ref


def dosed(ref: str, dose: float, **fields: Any) -> dict[str, Any]:
    return {"interventions": [{"artifact": ref, "strength": {"kl": dose}, **fields}], "report": "summary"}


def test_without_a_calibration_the_command_is_named(client: Client) -> None:
    client.create_artifact({"name": "bare", "kind": "vector", "op": "add", "site": "resid_post"},
                           {2: {"vector": [1.0] * WIDTH}})
    with pytest.raises(Conflict, match="Run: trimtab calibrate bare@1 --prompts FILE") as caught:
        client.complete("Review:", model="lab-dense", steering=dosed("bare", 0.5))
    assert caught.value.code == "not_calibrated" and caught.value.param == "steering.interventions[0].strength"


def test_from_calibration_to_dose(client: Client, ref: str) -> None:
    stages: list[str] = []
    found = client.calibrate(ref, PROMPTS, on_progress=lambda job: stages.append(job.stage), reach=[0.05, 1.0], **QUICK,
                             target={"prompts": PROMPTS, "scorer": {"kind": "words", "any": ["the"]}})
    setting = found.settings[0]
    assert found.artifact == ref and stages[-1] == "placebo"
    for side in ("up", "down"):
        kl = [point["kl"] for point in setting[side]]
        assert kl[0] < 0.3 * kl[-1] and all(0 <= point["target"] <= 1 for point in setting[side])
    assert setting["base"]["kl"] == 0 and setting["base"]["perplexity"] > 1
    # Of the middle of the curve and of its end.
    assert [row["strength"] for row in setting["floor"]] == [
        setting["up"][n]["strength"] for n in (len(setting["up"]) // 2, len(setting["up"]) - 1)]
    assert client.calibration(ref)["settings"][0]["up"] == setting["up"]
    assert client.get_artifact(ref).card == {"calibration": client.calibration(ref)} or client.get_artifact(ref).card
    assert client.calibration_plot(ref).startswith(b"\x89PNG")
    assert b"<svg" in client.calibration_plot(ref, format="svg")
    with pytest.raises(NotFound):
        client.calibration_plot(ref, setting=3)

    # The ends of a curve are on it, whatever noise there is between them.
    middle = setting["up"][-1]["kl"]
    client.create_preset("dosed", {"interventions": [{"artifact": ref, "strength": {"kl": middle}}]})
    preset = client.complete(PROMPTS[0], model="lab-dense:dosed", max_tokens=4, steering={"report": "none"})
    asked = client.complete(PROMPTS[0], model="lab-dense", max_tokens=4, steering=dosed(ref, middle))
    for answer in (preset, asked):
        strength = answer.steering.applied[0].strength
        assert (strength["value"], strength["unit"]) == (middle, "kl")
        assert strength["scale"]["2"] == pytest.approx(setting["up"][-1]["strength"], rel=0.02)
    down = client.complete(PROMPTS[0], model="lab-dense", max_tokens=4, steering=dosed(ref, -setting["down"][-1]["kl"]))
    assert down.steering.applied[0].strength["scale"]["2"] == pytest.approx(-setting["down"][-1]["strength"], rel=0.02)


def test_the_same_completions_have_the_kl_of_the_card(client: Client, ref: str) -> None:
    """The curve is what the effects of those very requests say: equal prompts, seeds and temperature."""
    setting = client.calibration(ref)["settings"][0]
    point = setting["up"][2]
    kl = []
    for n, prompt in enumerate(PROMPTS):
        answer = client.complete(prompt, model="lab-dense", max_tokens=6, temperature=1.0, seed=n, steering={
            "interventions": [{"artifact": ref, "strength": point["strength"]}], "report": "summary"})
        assert answer.steering.effects is not None
        kl.append(answer.steering.effects["choices"][0]["total"]["kl"]["mean"])
    assert sum(kl) / len(kl) == pytest.approx(point["kl"], rel=1e-3)


@pytest.mark.parametrize("fields, message", [
    ({"scope": {"prompt": "none"}}, "for other layers, tokens or options only"),
    ({"strength": {"kl": 50.0}}, "outside of what was measured"),
    ({"strength": {"kl": 0.5, "unit": "kl"}}, "give either kl, or value and unit"),
])
def test_doses_that_are_refused(client: Client, ref: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        client.complete("Review:", model="lab-dense", steering=dosed(ref, 0.3, **fields))


def test_the_command(typed: Callable[..., Result], client: Client, ref: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join([*(json.dumps({"text": prompt}) for prompt in PROMPTS[:6]), *PROMPTS[6:]]) + "\n")
    done = typed("calibrate", ref, "--prompts", str(prompts), "--words", "the, a", "--without", "never", "--scope",
                 '{"prompt": "none"}', "--strengths", "0.2,0.4", "--draws", "1", "--max-tokens", "4", "-o",
                 str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "KL per token" in done.output and "-0.4" in done.output
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{ref.replace('@', '-')}.{end}" for end in ("json", "png", "svg")]
    settings = client.calibration(ref)["settings"]
    assert [setting["scope"] for setting in settings] == [{"prompt": "none", "generation": "all"}, {
        "prompt": "all", "generation": "all"}]
    answer = client.complete("Review:", model="lab-dense", max_tokens=3, steering=dosed(
        ref, settings[0]["up"][1]["kl"], scope={"prompt": "none"}))
    assert answer.steering.applied[0].strength["scale"]["2"] == pytest.approx(0.4, rel=1e-3)


def test_words_are_needed_for_a_target(typed: Callable[..., Result], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    done = typed("calibrate", "to-calibrate", "--prompts", str(prompts), "--target", str(prompts))
    assert done.exit_code == 1 and "--words" in done.output
