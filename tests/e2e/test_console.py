"""The console in a browser, against a real server on the bundled model."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect
from trimtab_client import Client

from scripts.browser import CHROMIUM
from tests.e2e.browser import axe_finds, page_of

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine; .ci/run installs it")
TEXT = "Review of a hotel. I stayed at it with my team on Monday."
ROOMS = {"playground": "Untouched", "library": "cheerful", "library/artifact/cheerful": "Calibration",
         "library/presets": "Served as", "library/upload": "Upload vectors", "make": "mean difference",
         "monitor": "What steering did", "rollouts": "There are no roll-outs yet",
         "model": "Where interventions can act", "keys": "Make one for each program or person"}


def pick(page: Page, name: str) -> None:
    page.get_by_label("Add an intervention").first.click()
    page.get_by_role("listbox", name="Artifacts").get_by_role("option", name=name).first.click()


def test_from_the_open_page_to_a_copied_call(page: Page, lab_url: str) -> None:
    """Untouched beside steered, another dose, what each intervention did, a preset, and the call as a shell runs it."""
    page.goto("/")
    page.get_by_label("Plain text to continue").check()
    page.get_by_placeholder("Text that the model goes on from").fill(TEXT)
    pick(page, "cheerful")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_text("What was done")).to_be_visible()
    answers = page.get_by_role("article", name="Answer")
    expect(answers).to_have_count(2)
    untouched, steered = (answer.inner_text() for answer in answers.all())
    with Client(lab_url) as client:
        expected = [client.complete(TEXT, steering=name, max_tokens=60, temperature=0, seed=0).text.strip()
                    for name in (None, "cheerful")]
    assert [untouched.strip().splitlines()[0], steered.strip().splitlines()[0]] == [
        text.splitlines()[0] for text in expected]
    assert untouched != steered
    expect(page.get_by_text("cheerful@1 added at layer 3 to")).to_be_visible()

    page.get_by_label("dose", exact=True).check()
    slider = page.get_by_role("slider")
    before = slider.get_attribute("aria-valuetext")
    slider.focus()
    slider.press("ArrowRight")
    expect(slider).not_to_have_attribute("aria-valuetext", before or "")
    page.get_by_label("What steering changed").check()
    page.get_by_role("button", name="Run").click()
    steered_column = page.get_by_role("region", name="Steered")
    steered_column.locator(".token").nth(3).hover()
    expect(steered_column.get_by_text("moved by")).to_be_visible()

    page.get_by_role("button", name="Use this…").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("from-the-page")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.get_by_text("It is served as")).to_be_visible()
    command = dialog.get_by_test_id("code").inner_text()
    answer = json.loads(subprocess.run(shlex.split(command), check=True, capture_output=True, timeout=120).stdout)
    assert answer["model"] == "lab-dense:from-the-page"
    assert answer["steering"]["applied"][0]["artifact"] == "cheerful@1"


def test_from_pasted_pairs_to_a_published_artifact(page: Page, lab_url: str) -> None:
    rows = [json.loads(line) for line in Path("lab/data/tense.jsonl").read_text().splitlines()][:60]
    page.goto("/#/make")
    page.get_by_role("textbox", name="Pairs", exact=True).fill("\n".join(json.dumps(row) for row in rows))
    expect(page.get_by_text("60 pairs can be used.")).to_be_visible()
    page.get_by_label("mean difference").check()
    page.get_by_label("Read at").select_option("mean")
    page.get_by_label("Name", exact=True).fill("console-past")
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_role("heading", name="3 · Report")).to_be_visible(timeout=300_000)
    page.get_by_role("spinbutton", name="Random artifacts").fill("2")
    page.get_by_label("Tokens an answer").fill("8")
    page.get_by_role("button", name="Calibrate").click()
    expect(page.get_by_role("heading", name="Calibration")).to_be_visible(timeout=300_000)
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_text("It is served as")).to_be_visible()
    with Client(lab_url) as client:
        assert "lab-dense:console-past" in client.models()
        artifact = client.get_artifact("console-past@production")
        assert artifact.card is not None and artifact.card["calibration"]["settings"]


def test_pairs_that_cannot_be_used_are_named_before_anything_runs(page: Page) -> None:
    page.goto("/#/make")
    page.get_by_role("textbox", name="Pairs", exact=True).fill('{"positive": "a", "negative": "a"}\nnonsense')
    expect(page.get_by_text("Line 2 is not JSON.")).to_be_visible()
    expect(page.get_by_text("shows no contrast")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_any_room(browser: Browser, lab_url: str, scheme: str) -> None:
    with page_of(browser, lab_url, color_scheme=scheme) as page:
        found = {}
        for room, text in ROOMS.items():
            page.goto(f"/#/{room}")
            expect(page.get_by_text(text).first).to_be_visible()
            found[room] = axe_finds(page)
        page.goto("/")
        page.get_by_placeholder("Ask the model something").fill("How do I bake a cake?")
        pick(page, "french")
        page.get_by_label("What steering changed").check()
        page.get_by_role("button", name="Run").click()
        expect(page.get_by_text("What was done")).to_be_visible()
        found["answered"] = axe_finds(page)
        assert found == {room: [] for room in found}


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    page.goto("/")
    area = page.get_by_placeholder("Ask the model something")
    expect(area).to_be_focused()
    page.keyboard.type("How do I bake a cake?")
    picker = page.get_by_label("Add an intervention")
    for _ in range(40):
        page.keyboard.press("Tab")
        if picker.evaluate("node => node === document.activeElement"):
            break
    page.keyboard.type("fren")
    expect(page.get_by_role("listbox", name="Artifacts").get_by_role("option").first).to_contain_text("french")
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="french")).to_be_visible()
    area.focus()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_text("What was done")).to_be_visible()


def test_a_phone_shows_every_room_without_scrolling_sideways(browser: Browser, lab_url: str) -> None:
    with page_of(browser, lab_url, viewport={"width": 375, "height": 720}) as page:
        for room, text in ROOMS.items():
            page.goto(f"/#/{room}")
            expect(page.get_by_text(text).first).to_be_visible()
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 375, (room, width)


def test_the_address_holds_the_whole_state(page: Page, browser: Browser, lab_url: str) -> None:
    page.goto("/")
    page.get_by_placeholder("Ask the model something").fill("Grüße 🌍")
    pick(page, "german")
    page.get_by_label("Samples").fill("2")
    expect(page.get_by_role("link", name="german")).to_be_visible()
    with page_of(browser, lab_url) as other:
        other.goto(page.url)
        expect(other.get_by_placeholder("Ask the model something")).to_have_value("Grüße 🌍")
        expect(other.get_by_role("link", name="german")).to_be_visible()
        expect(other.get_by_label("Samples")).to_have_value("2")


def test_names_and_output_of_others_are_text(page: Page, lab_url: str) -> None:
    hostile = "<img src=x onerror=\"document.title='owned'\">"
    with Client(lab_url) as client:
        client.create_artifact({"name": "hostile", "kind": "vector", "op": "add", "site": "resid_post",
                                "description": hostile, "tags": ["console-test"]}, {2: {"vector": [1.0] * 128}})
    page.goto("/#/library")
    page.get_by_label("Search names").fill("hostile")
    expect(page.get_by_text(hostile)).to_be_visible()
    page.goto("/#/library/artifact/hostile")
    expect(page.get_by_text(hostile)).to_be_visible()
    page.goto("/")
    page.get_by_label("Plain text to continue").check()
    page.get_by_placeholder("Text that the model goes on from").fill(hostile)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("article", name="Answer")).to_be_visible()
    assert page.title() == "Trimtab"


def test_the_kill_switch_asks_first_and_shows_who_is_held_back(page: Page, lab_url: str) -> None:
    page.goto("/#/monitor")
    page.get_by_role("button", name="Turn all steering off…").click()
    page.get_by_role("button", name="Turn it off").click()
    try:
        expect(page.get_by_text("All steering is off")).to_be_visible()
        with Client(lab_url) as client:
            assert client.kill_switch().on
    finally:
        page.get_by_role("button", name="Turn steering on again").click()
    expect(page.get_by_text("Steering is on")).to_be_visible()


def test_a_drift_in_live_traffic_is_seen_after_one_refresh_and_its_cause_found_by_clicking(page: Page, lab_url: str
                                                                                            ) -> None:
    """An alias that traffic uses is moved to a version of triple strength, and from there it is rolled back."""
    with Client(lab_url) as client:
        content = client.download_artifact("cheerful")
        for value in (1.5, 4.5):
            client.import_artifact(content, {"name": "drifting", "strength": {"value": value, "unit": "raw"}})
        client.set_alias("drifting", "production", 1)

        def traffic() -> None:
            for _ in range(3):
                client.complete(TEXT, max_tokens=24, temperature=0, steering={
                    "interventions": [{"artifact": "drifting@production"}], "report": "summary"})

        traffic()
        page.goto("/#/monitor")
        effects = page.get_by_role("region", name="Effects")
        expect(effects.get_by_role("row", name="drifting@1")).to_be_visible()
        expect(effects.get_by_role("row", name="drifting@2")).to_have_count(0)
        client.set_alias("drifting", "production", 2)
        traffic()
        page.get_by_role("button", name="Refresh").click()
        note = effects.get_by_text("drifting@2 acts in the place of drifting@1")
        expect(note).to_be_visible()
        expect(note).to_contain_text("times as much")
        note.get_by_role("link", name="What differs").click()
        expect(page.get_by_role("heading", name="drifting version 2")).to_be_visible()
        expect(page.get_by_test_id("differences").get_by_role("row", name="strength.value 1.5 4.5")).to_be_visible()
        page.get_by_role("button", name="Roll production back from 2 to 1").click()
        expect(page.get_by_text('"production" means version 1 now.')).to_be_visible()
        assert client.get_artifact("drifting@production").version == 1


def test_a_receipt_is_opened_in_monitor(page: Page, lab_url: str) -> None:
    with Client(lab_url) as client:
        answer = client.complete(TEXT, max_tokens=4, temperature=0, steering="german")
    page.goto("/#/monitor")
    page.get_by_label("By id").fill(answer.id)
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_role("dialog").get_by_text("german@1 added at layer")).to_be_visible()
    page.keyboard.press("Escape")
    row = page.get_by_role("region", name="Receipts").get_by_role("row", name="german@1").first
    row.get_by_role("link").click()
    expect(page.get_by_role("dialog").get_by_text("german@1 added at layer")).to_be_visible()


def test_at_a_token_both_models_tell_what_else_they_would_have_said(page: Page, lab_url: str) -> None:
    """The untouched model's are those that it gives by itself over the API, and the answer goes on from that token."""
    page.goto("/")
    page.get_by_label("Plain text to continue").check()
    page.get_by_placeholder("Text that the model goes on from").fill(TEXT)
    pick(page, "cheerful")
    page.get_by_label("What steering changed").check()
    page.get_by_role("button", name="Run").click()
    steered = page.get_by_role("region", name="Steered")
    expect(steered.get_by_text("What was done")).to_be_visible()
    steered.locator(".token").nth(5).click()
    facts = steered.locator("dl.instead")
    expect(facts).to_contain_text("Likeliest, untouched")
    def completed(prompt: Any, **fields: Any) -> Any:
        asked = {"model": "lab-dense", "prompt": prompt, "temperature": 0, "seed": 0, **fields}
        return httpx.post(f"{lab_url}/v1/completions", json=asked, timeout=120).json()["choices"][0]

    answered = completed(TEXT, max_tokens=60, return_token_ids=True, steering={
        "interventions": [{"artifact": "cheerful"}]})
    ids = answered["prompt_token_ids"]
    said = completed([*ids, *answered["token_ids"][:6]], max_tokens=0, prompt_logprobs=1)
    [best] = [one for one in said["prompt_logprobs"][-1].values() if one["rank"] == 1]
    expect(facts.locator("div").nth(1)).to_contain_text(json.dumps(best["decoded_token"], ensure_ascii=False))
    page.get_by_role("button", name="Go on from here").click()
    expect(page.get_by_text(f"token {len(ids) + 6} of prompt and answer")).to_be_visible()
    expect(page.get_by_role("article", name="Answer")).to_have_count(2)
    expect(steered.get_by_text("What was done")).to_be_visible()


def test_a_painted_prompt_is_where_an_intervention_acts(page: Page) -> None:
    page.goto("/")
    page.get_by_placeholder("Ask the model something").fill("How do I bake a cake?")
    pick(page, "french")
    page.get_by_text("Layers, tokens, gate, options").click()
    page.get_by_role("button", name="Paint the prompt…").click()
    dialog = page.get_by_role("dialog")
    tokens = dialog.get_by_role("listbox", name="Tokens of the prompt").get_by_role("option")
    expect(tokens.first).to_be_visible()
    dialog.get_by_role("button", name="user,").click()
    whole = dialog.locator('[aria-selected="true"]').count()
    assert 0 < whole < tokens.count()
    tokens.nth(3).click()
    expect(dialog.locator('[aria-selected="true"]')).to_have_count(whole - 1)
    page.keyboard.press("Escape")
    page.get_by_label("Generated tokens").select_option("none")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_text(f"to {whole - 1} tokens")).to_be_visible()


def test_the_page_is_public_and_bounded_by_its_policy(lab_url: str) -> None:
    answer = httpx.get(lab_url)
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "unsafe-inline" not in policy and "http" not in policy
    scripts = [part.split('"')[0] for part in answer.text.split('src="')[1:]]
    assert scripts and all(script.startswith("./") for script in scripts)
    asset = httpx.get(f"{lab_url}/{scripts[0]}")
    assert asset.status_code == 200 and "immutable" in asset.headers["cache-control"]
    for outside in ("/assets/..%2Findex.html", "/assets/%2e%2e%2f%2e%2e%2fpackage.json", "/assets/nothing.js"):
        assert httpx.get(lab_url + outside).status_code == 404


def test_the_page_is_small(lab_url: str) -> None:
    scripts = list(Path("clients/web/dist/assets").glob("*.js"))
    packed = sum(len(subprocess.run(["gzip", "-9", "-c", script], capture_output=True, check=True).stdout)
                 for script in scripts)
    assert 0 < packed <= 250_000
