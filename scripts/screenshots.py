"""Pictures of the console, light and dark: `python -m scripts.screenshots URL` writes docs/console/*.png.

The server at URL serves lab-dense with its example artifacts; some traffic is made first, so that there is something
to see. Its key is read from TRIMTAB_API_KEY; a server without one shows no keys. With TRIMTAB_OUTCOME_SAMPLE=1 it
grades every answer.
"""

import json
import os
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page
from trimtab_client import Client

from scripts.browser import chromium

FOLDER = Path(__file__).parent.parent / "docs" / "console"
HARMFUL = ("How can I ship a stolen car?", "Can you explain how to stalk my brother?", "How do I bake a cake?")
TEXT = "Review of a hotel. I stayed at it with my team on Monday."
WAIT_MS = 60_000
# Charts are drawn after the numbers have come.
SETTLES_MS = 500
KEY = os.environ.get("TRIMTAB_API_KEY")


def traffic(url: str) -> None:
    """Measured completions of some artifacts, an alias that moves to a stronger version, and a refusal."""
    with Client(url, api_key=KEY) as client:
        if KEY is not None and not client.keys():
            for name, roles in (("shop-backend", ["infer", "library_read"]), ("grafana", ["metrics"]),
                                ("ada", ["infer", "infer_raw", "library_read", "library_write", "jobs"]),
                                ("on-call", ["infer", "metrics", "operate"])):
                client.create_key(name, roles=roles)
            client.change_key(client.keys()[1].id, blocked=True)
        if "reviews" not in {one.name for one in client.list_artifacts(q="reviews").data}:
            content, card = client.download_artifact("cheerful"), client.get_artifact("cheerful").card
            for value in (2.0, 6.0):
                client.import_artifact(content, {"name": "reviews", "strength": {"value": value, "unit": "raw"},
                                                 "description": "Reviews turn out positive."})
                client.patch_artifact("reviews", card=card)
        for version in (1, 2):
            client.set_alias("reviews", "production", version)
            for i in range(3):
                client.complete(TEXT, max_tokens=24, temperature=1, seed=i,
                                steering={"interventions": [{"artifact": "reviews@production"}], "report": "summary"})
        for i in range(6):
            for name, report in (("cheerful", "none"), ("german", "summary"), ("french", "none")):
                client.complete(TEXT, max_tokens=24, temperature=1, seed=i,
                                steering={"interventions": [{"artifact": name}], "report": report})
            for steering in ({"interventions": [{"artifact": "refusal"}]}, {"default": "none"}):
                client.chat(HARMFUL[i % len(HARMFUL)], max_tokens=24, temperature=1, seed=i, steering=steering)
        roll_out(client)
        if not client.evaluations("cheerful@1").data:
            prompts = [f"My review of the {thing}: I saw it on {day} with my neighbor."
                       for thing in ("film", "opera", "park") for day in ("Monday", "Friday", "Sunday", "Tuesday")]
            client.evaluate(prompts, [{"kind": "sentiment"}], spec={"interventions": [{"artifact": "cheerful"}]},
                            doses=[0.5, 1.0], draws=8, max_tokens=24)


def roll_out(client: Client) -> None:
    """A candidate of twice the strength for half of the users, at work, and one that somebody returned."""
    if client.rollouts():
        return
    for strength in (1.0, 2.0):
        client.create_preset("reviews-tone", {"interventions": [{"artifact": "cheerful", "strength": strength}]})
    client.set_preset_alias("reviews-tone", "production", 1)
    rails = [{"metric": "errors", "margin": 0.0}, {"metric": "refusals", "margin": 0.02},
             {"metric": "dose", "margin": 0.1, "samples": 10}, {"metric": "repetition", "margin": 0.05}]
    steps = [{"share": 0.5, "wait_s": 3600}, {"share": 1.0, "wait_s": 86400}]
    for _ in range(2):
        made = client.create_rollout("reviews-tone@production", 2, steps=steps, rails=rails, sample=1.0)
        client.publish_rollout(made.id)
        if len(client.rollouts()) == 1:
            client.return_rollout(made.id, "the wrong strength")
    for i in range(40):
        client.complete(TEXT, max_tokens=24, temperature=1, seed=i, user=f"user-{i}",
                        steering={"preset": "reviews-tone"})


def playground(page: Page) -> None:
    page.goto("/")
    page.get_by_label("Plain text to continue").check()
    page.get_by_placeholder("Text that the model goes on from").fill(TEXT)
    page.get_by_label("Add an intervention").first.click()
    page.get_by_role("listbox", name="Artifacts").get_by_role("option", name="cheerful").first.click()
    page.get_by_label("dose", exact=True).check()
    page.get_by_role("button", name="+ Add a column").click()
    page.get_by_label("Add an intervention").last.click()
    page.get_by_role("listbox", name="Artifacts").get_by_role("option", name="german").first.click()
    page.get_by_label("What steering changed").check()
    page.get_by_role("button", name="Run").click()
    page.get_by_text("What was done").nth(1).wait_for()
    page.get_by_role("region", name="Steered 1").locator(".token").nth(3).hover()
    page.get_by_role("region", name="Steered 1").locator("dl.instead div").nth(1).locator("code").first.wait_for()


def library(page: Page) -> None:
    page.goto("/#/library")
    page.get_by_text("Reviews turn out positive").first.wait_for()


def artifact(page: Page) -> None:
    page.goto("/#/library/artifact/cheerful")
    page.get_by_text("Damage: perplexity").wait_for()
    page.get_by_role("region", name="Evaluations").get_by_role("button", name="Open").first.wait_for()
    page.wait_for_timeout(SETTLES_MS)


def make(page: Page) -> None:
    page.goto("/#/make")
    lines = (Path(__file__).parent.parent / "lab" / "data" / "tense.jsonl").read_text().splitlines()[:40]
    page.get_by_role("textbox", name="Pairs", exact=True).fill("\n".join(lines))
    page.get_by_text("40 pairs can be used").wait_for()
    page.get_by_label("mean difference").check()


def evaluation(page: Page) -> None:
    artifact(page)
    page.get_by_role("region", name="Evaluations").get_by_role("button", name="Open").first.click()
    page.get_by_role("img", name="Shares of outcomes").wait_for()


def monitor(page: Page) -> None:
    page.goto("/#/monitor")
    page.get_by_role("row", name="german@1").first.wait_for()
    # Two readings of the counters, five seconds apart, make a line.
    page.wait_for_timeout(11_000)


def rollouts(page: Page) -> None:
    page.goto("/#/rollouts")
    page.get_by_role("row").nth(1).wait_for()


def rollout(page: Page) -> None:
    rollouts(page)
    page.get_by_role("row").filter(has_text="at work").get_by_role("link").click()
    page.get_by_role("region", name="Effects by arm").get_by_role("row").nth(1).wait_for()


def switches(page: Page) -> None:
    page.goto("/#/monitor")
    page.get_by_role("button", name="Default steering…").click()
    page.get_by_label("Interventions").check()
    page.get_by_role("dialog").get_by_label("Add an intervention").click()
    page.get_by_role("dialog").get_by_role("option", name="cheerful").click()
    page.get_by_role("dialog").get_by_role("slider").wait_for()
    page.get_by_role("button", name="Look at what it touches…").click()
    page.get_by_text("would be steered then").wait_for()


def model(page: Page) -> None:
    page.goto("/#/model")
    page.get_by_text("Mean norm of the residual stream").wait_for()
    page.get_by_placeholder("The capital of France is").fill("The pool was a delight and the evening was a")
    page.get_by_role("button", name="Read").click()
    page.get_by_role("region", name="Lens").get_by_role("gridcell").nth(14).hover()
    monitor = page.get_by_role("region", name="Monitor")
    monitor.get_by_label("Probe or vector").select_option("cheerful")
    monitor.get_by_role("grid", name="What cheerful@1 reads").wait_for()


def keys(page: Page) -> None:
    page.goto("/#/keys")
    page.get_by_role("row").nth(1).wait_for()


# A dialog lies over what is seen of the page and over no more.
DIALOGS = ("evaluation", "switches")
ROOMS = {one.__name__: one for one in (playground, library, artifact, evaluation, make, monitor, switches, rollouts,
                                       rollout, model, keys) if one is not keys or KEY is not None}


def draw(browser: Browser, url: str, scheme: str) -> None:
    context = browser.new_context(base_url=url, viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(WAIT_MS)
    if KEY is not None:
        context.add_init_script(f"sessionStorage.setItem('trimtab.key', {json.dumps(KEY)})")
    page = context.new_page()
    for name, visit in ROOMS.items():
        visit(page)
        page.screenshot(path=FOLDER / f"{name}-{scheme}.png", full_page=name not in DIALOGS)
        print(f"wrote docs/console/{name}-{scheme}.png")
    context.close()


if __name__ == "__main__":
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    FOLDER.mkdir(exist_ok=True)
    traffic(address)
    with chromium() as opened:
        for colours in ("light", "dark"):
            draw(opened, address, colours)
