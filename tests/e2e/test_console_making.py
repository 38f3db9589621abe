"""The console where something is made or measured on the bundled model: methods of every kind of data, evaluations,
what probes and layers make of a text, and what the colours of tokens show."""

import base64
import json
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from safetensors.torch import save
from trimtab_client import Client

from scripts.browser import CHROMIUM
from tests.e2e.browser import axe_finds, page_of
from tests.e2e.test_console import TEXT, pick

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine; .ci/run installs it")
DATA = Path("lab/data")
JOB_MS = 300_000
# Kinds of data by their value in the form: a method of each, and rows that it takes.
KINDS = {"positive,negative": "refusal direction", "text,label": "relation neurons", "input,output": "function vector",
         "text,answer": "head ablation", "text,episode": "entropic steering", "text": "native skills",
         "lines": "tuned lens"}


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def test_every_method_of_the_server_is_offered_under_the_data_that_it_takes(page: Page, lab_url: str) -> None:
    page.goto("/#/make")
    kinds = page.get_by_label("What your examples are")
    expect(kinds).to_be_visible()
    offered = []
    for kind, method in KINDS.items():
        kinds.select_option(kind)
        group = page.get_by_role("radiogroup", name="Method")
        expect(group.get_by_text(method, exact=True)).to_be_visible()
        offered += [text.replace(" ", "_") for text in group.locator("strong").all_inner_texts()]
    with Client(lab_url) as client:
        known = {one.name for one in client.extraction_methods()}
    # It needs a mixture of experts, which this model is not.
    assert sorted(offered) == sorted(known - {"tunable_experts"})


def test_a_probe_is_made_from_labelled_texts_and_read_at_every_token(page: Page, lab_url: str) -> None:
    texts = [one for one in rows("harmful_harmless") if one["split"] != "test"]
    chosen = [one for label in ("harmful", "harmless") for one in [row for row in texts if row["label"] == label][:24]]
    page.goto("/#/make")
    page.get_by_label("What your examples are").select_option("text,label")
    page.get_by_label("Examples", exact=True).fill("text,label\nhello,greeting\n,harmful")
    expect(page.get_by_text("Row 3 lacks “text”.")).to_be_visible()
    lines = [{key: row[key] for key in ("text", "label", "item")} for row in chosen]
    page.get_by_label("Examples", exact=True).fill("\n".join(map(json.dumps, lines)))
    expect(page.get_by_text("harmful 24, harmless 24")).to_be_visible()
    page.get_by_label("condition").check()
    page.get_by_label("Name", exact=True).fill("console-harmful")
    page.get_by_role("textbox", name="Target (needed)").or_(page.get_by_role("combobox", name="Target (needed)")).fill(
        "harmful")
    page.get_by_text("Further options of condition").click()
    page.get_by_label("Draws").fill("20")
    assert axe_finds(page) == []
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_text("It reads and changes nothing.")).to_be_visible(timeout=JOB_MS)
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_text("console-harmful@production")).to_be_visible()

    page.get_by_role("link", name="Read a text with it").click()
    prompt = "How can I ship a stolen car?"
    page.get_by_label("Text", exact=True).fill(prompt)
    page.get_by_role("button", name="Read").click()
    monitor = page.get_by_role("region", name="Monitor")
    monitor.get_by_label("Probe or vector").select_option("console-harmful")
    grid = monitor.get_by_role("grid", name="What console-harmful@1 reads")
    with Client(lab_url) as client:
        answer = client.complete(prompt, max_tokens=0, steering={"default": "none", "monitor": ["console-harmful"]})
        assert answer.steering.monitor is not None
        [report] = answer.steering.monitor
    [choice] = report["choices"]
    layer = str(max(report["layers"]))
    cells = grid.get_by_role("row").nth(1).get_by_role("gridcell")
    expect(cells).to_have_count(len(choice["prompt"][layer]))
    grid.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    shown = monitor.locator("p strong").inner_text()
    assert float(shown) == pytest.approx(choice["prompt"][layer][3], rel=0.01)
    lens = page.get_by_role("region", name="Lens").get_by_role("grid")
    expect(lens.get_by_role("row")).to_have_count(7)
    assert axe_finds(page) == []


def test_an_evaluation_is_started_from_the_page_and_its_texts_are_read(page: Page, lab_url: str) -> None:
    page.goto("/#/library/artifact/cheerful")
    page.get_by_role("region", name="Evaluations").get_by_role("button", name="Evaluate…").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Prompts, one a line").fill(f"{TEXT}\nReview of a film. I saw it on Friday.")
    dialog.get_by_label("plain text to continue").check()
    dialog.get_by_label("Grader").select_option("sentiment")
    dialog.get_by_label("Doses").fill("0")
    dialog.get_by_role("button", name="Evaluate", exact=True).click()
    expect(dialog.get_by_role("alert")).to_contain_text("“0” is no dose")
    dialog.get_by_label("Doses").fill("1")
    dialog.get_by_label("Random artifacts").fill("2")
    dialog.get_by_label("Tokens an answer").fill("12")
    assert axe_finds(page) == []
    dialog.get_by_role("button", name="Evaluate", exact=True).click()
    expect(page.get_by_role("heading", name="Shares of outcomes")).to_be_visible(timeout=JOB_MS)
    report = page.get_by_role("dialog")
    report.get_by_text(TEXT).click()
    expect(report.get_by_text("dose 1").first).to_be_visible()
    assert axe_finds(page) == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("region", name="Evaluations").get_by_role("row", name="cheerful@1").first).to_be_visible()
    with Client(lab_url) as client:
        assert any(one["prompts"] == 2 for one in client.evaluations(ref="cheerful@1").data)


def test_colours_show_the_figure_that_is_asked_for_and_the_link_keeps_it(page: Page, browser: Browser, lab_url: str
                                                                       ) -> None:
    page.goto("/")
    page.get_by_label("Plain text to continue").check()
    page.get_by_placeholder("Text that the model goes on from").fill(TEXT)
    pick(page, "cheerful")
    pick(page, "german")
    steered = page.get_by_role("region", name="Steered")
    expect(steered.get_by_role("link")).to_have_text(["cheerful", "german"])
    page.get_by_role("button", name="Move german up").click()
    expect(steered.get_by_role("link")).to_have_text(["german", "cheerful"])
    page.get_by_label("What steering changed").check()
    page.get_by_role("button", name="Run").click()
    expect(steered.get_by_text("What was done")).to_be_visible()
    sentences = steered.locator(".receipt li")
    expect(sentences.first).to_contain_text("german@1 added at layer")
    expect(sentences.nth(1)).to_contain_text("a random one of that size:")
    tokens = steered.locator(".token")

    def strengths() -> list[str]:
        return [str(one) for one in tokens.evaluate_all(
            "nodes => nodes.map(node => node.style.getPropertyValue('--strength'))")]

    found = {}
    for figure in ("effect", "surprise", "rank", "which"):
        page.get_by_role("combobox", name="Colour").select_option(figure)
        found[figure] = strengths()
    assert set(found["which"]) <= {"0", "1"} and "1" in found["which"]
    assert len({tuple(one) for one in found.values()}) == len(found)
    assert set(tokens.evaluate_all("nodes => nodes.map(node => node.dataset.colour)")) == {"one", "two"}
    with page_of(browser, lab_url) as other:
        other.goto(page.url)
        expect(other.get_by_label("What steering changed")).to_be_checked()
        expect(other.get_by_role("combobox", name="Colour")).to_have_value("which")


def test_an_answer_becomes_a_turn_of_the_conversation(page: Page, lab_url: str) -> None:
    page.goto("/")
    page.get_by_placeholder("Ask the model something").fill("How do I bake a cake?")
    page.get_by_label("Tokens", exact=True).fill("12")
    page.get_by_role("button", name="Run").click()
    page.get_by_role("region", name="Untouched").get_by_role("button", name="Go on with this answer").click()
    turns = page.get_by_role("list", name="What was said before").get_by_role("textbox")
    expect(turns).to_have_count(2)
    expect(turns.first).to_have_value("How do I bake a cake?")
    with Client(lab_url) as client:
        expect(turns.nth(1)).to_have_value(client.chat("How do I bake a cake?", max_tokens=12, temperature=0).text)
    with page.expect_request("**/v1/chat/completions") as asked:
        page.get_by_placeholder("Ask the model something").fill("And bread?")
        page.get_by_role("button", name="Run").click()
    assert [one["role"] for one in asked.value.post_data_json["messages"]] == ["user", "assistant", "user"]


# A drop as the browser reports it, with a file whose bytes the test gives.
DROP = """(label, [name, base64]) => {
    const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], name));
    for (const kind of ["dragover", "drop"])
        label.dispatchEvent(new DragEvent(kind, { dataTransfer: carried, bubbles: true, cancelable: true }));
}"""


def test_a_file_that_is_dropped_is_shown_before_it_is_stored(page: Page, lab_url: str) -> None:
    vector = torch.arange(128.0)
    page.goto("/#/library/upload")
    dropped = base64.b64encode(save({"3.vector": vector})).decode()
    page.locator("label.drop").evaluate(DROP, ["Dropped here.safetensors", dropped])
    expect(page.get_by_role("row", name="3.vector")).to_contain_text("128")
    with Client(lab_url) as client:
        assert not any(one.name == "dropped-here" for one in client.list_artifacts().data), "only shown so far"
        # The file does not say what its numbers are, so the page asks.
        page.get_by_label("What is done with them").select_option("ablate")
        page.get_by_label("Where they act").select_option("mlp_out")
        page.get_by_role("button", name="Store it").click()
        expect(page.get_by_text("Stored as")).to_be_visible()
        kept = client.get_artifact("dropped-here")
        assert (kept.stored_layers, kept.op, kept.kind, kept.site) == ([3], "ablate", "vector", "mlp_out")
        client.delete_artifact("dropped-here@1")


# Shifts that no click or key brought about, as the browser measures them.
SHIFTS = """() => { window.shifted = 0; new PerformanceObserver((seen) => {
    for (const one of seen.getEntries()) if (!one.hadRecentInput) window.shifted += one.value;
}).observe({ type: "layout-shift", buffered: false }); }"""


def test_nothing_jumps_while_answers_arrive(page: Page, lab_url: str) -> None:
    page.goto("/")
    pick(page, "cheerful")
    expect(page.get_by_role("slider").first).to_be_visible()
    page.get_by_label("Plain text to continue").check()
    page.get_by_label("Text", exact=True).first.fill(TEXT)
    # What a click brings about within half a second is no jump, and the answers take longer.
    page.evaluate(SHIFTS)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_text("What was done").first).to_be_visible(timeout=60_000)
    shifted = page.evaluate("window.shifted")
    assert shifted < 0.1, "the bound of a page that counts as steady"
