"""The console where it matters who asks: keys and roles, the kill switch and the default steering with who turned them
and whom they touch, and what live grading found."""

import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect
from trimtab_client import Client

from scripts.browser import CHROMIUM
from server.text.vocabulary import Vocabulary
from tests.e2e.browser import axe_finds, page_of
from tests.e2e.scripted_site import Site
from tests.vectors.making import metadata, vector_payload

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine; .ci/run installs it")
OWNER = "the-owner-s-key"
REQUESTS = 3
GRADED_S = 60


def answer(vocabulary: Vocabulary) -> list[int]:
    return vocabulary.encode(" good day hello world", special_tokens=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("access") / "site", answer, api_key=OWNER, outcome_sample=1.0)
    library = made.library()
    library.create(metadata("calm", description="Calmer answers."), vector_payload(1, layers=(1,)))
    library.close()
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def owner(site: Site) -> Iterator[Client]:
    with Client(site.url, api_key=OWNER) as made:
        yield made


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    with page_of(browser, site.url) as opened:
        unlocked(opened, OWNER)
        yield opened


def unlocked(page: Page, key: str) -> None:
    page.goto("/")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Unlock").click()
    expect(page.get_by_role("button", name="Forget the key")).to_be_visible()


def room(page: Page, name: str) -> None:
    page.get_by_role("navigation", name="Rooms").get_by_role("link", name=name).click()


def test_a_key_is_made_shown_once_used_rotated_and_blocked(page: Page, site: Site) -> None:
    room(page, "Keys")
    expect(page.get_by_text("Make one for each program or person")).to_be_visible()
    page.get_by_role("button", name="Make a key…").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("shop")
    dialog.get_by_label("metrics").check()
    assert axe_finds(page) == []
    dialog.get_by_role("button", name="Make it").click()
    secret = page.get_by_test_id("secret").inner_text()
    with Client(site.url, api_key=secret) as shop:
        assert shop.own_key().roles == ["infer", "library_read", "metrics"]
        page.get_by_role("button", name="I have it").click()
        assert secret not in page.content()
        row = page.get_by_role("row", name="shop")
        expect(row).to_contain_text("works")
        assert axe_finds(page) == []
        page.set_viewport_size({"width": 375, "height": 720})
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        page.set_viewport_size({"width": 1280, "height": 900})
        row.get_by_role("button", name="Change shop").click()
        page.get_by_label("Hours that the present one still counts").fill("0")
        page.get_by_role("button", name="Rotate it").click()
        other = page.get_by_test_id("secret").inner_text()
        page.get_by_role("button", name="I have it").click()
        with pytest.raises(Exception, match="missing or wrong"):
            shop.models()
    with Client(site.url, api_key=other) as shop:
        assert shop.models()
        row.get_by_role("button", name="Change shop").click()
        page.get_by_role("button", name="Block it").click()
        expect(row).to_contain_text("blocked")
        with pytest.raises(Exception, match="is blocked"):
            shop.models()


def test_a_key_sees_the_rooms_that_it_may_enter(browser: Browser, site: Site, owner: Client) -> None:
    key = owner.create_key("reader", roles=["infer", "library_read"]).key
    with page_of(browser, site.url) as page:
        unlocked(page, key)
        expect(page.get_by_role("navigation", name="Rooms").get_by_role("link", name="Keys")).to_have_count(0)
        room(page, "Monitor")
        expect(page.get_by_text("needs the role metrics, which the key “reader” does not have")).to_be_visible()
        assert axe_finds(page) == []
        room(page, "Library")
        page.get_by_role("link", name="calm").click()
        expect(page.get_by_text("Calmer answers.")).to_be_visible()
        expect(page.get_by_text("No preset uses it.")).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)


def test_the_kill_switch_says_whom_it_touches_and_who_turned_it(browser: Browser, site: Site, owner: Client) -> None:
    for _ in range(REQUESTS):
        owner.complete("Hello", max_tokens=2, steering="calm")
    owner.complete("Hello", max_tokens=2)
    key = owner.create_key("ada", roles=["infer", "metrics", "operate", "library_read"]).key
    with page_of(browser, site.url) as page:
        unlocked(page, key)
        room(page, "Monitor")
        page.get_by_role("button", name="Turn all steering off…").click()
        touched = page.get_by_role("dialog").get_by_role("list", name="What it touches")
        expect(touched).to_contain_text(f"with calm ({REQUESTS} times)")
        expect(touched).to_contain_text("No completion runs now.")
        assert axe_finds(page) == []
        page.get_by_role("button", name="Turn it off").click()
        switches = page.get_by_role("region", name="Switches")
        expect(switches).to_contain_text("Turned off by ada,")
        turned = owner.kill_switch().turned
        assert turned is not None and turned.by == "ada"
        page.get_by_role("button", name="Turn steering on again").click()
        expect(switches).to_contain_text("Turned on again by ada,")


def test_any_spec_becomes_the_default_steering_after_a_look_at_what_it_touches(page: Page, owner: Client) -> None:
    room(page, "Monitor")
    try:
        page.get_by_role("button", name="Default steering…").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Interventions").check()
        dialog.get_by_label("Add an intervention").click()
        dialog.get_by_role("option", name="calm").click()
        expect(dialog.get_by_role("slider")).to_be_visible()
        assert axe_finds(page) == []
        dialog.get_by_role("button", name="Look at what it touches…").click()
        expect(dialog.get_by_role("list", name="What it touches")).to_be_visible()
        assert owner.default_spec().spec is None
        dialog.get_by_role("button", name="Use it for every request").click()
        switches = page.get_by_role("region", name="Switches")
        expect(switches).to_contain_text("Every request that does not say otherwise starts with calm. Set by owner,")
        assert owner.complete("Hello", max_tokens=2).steering.applied[0].source == "default"

        page.get_by_role("button", name="Default steering…").click()
        dialog.get_by_label("A spec as JSON").check()
        dialog.get_by_label("Spec: interventions").fill('{"interventions": [')
        dialog.get_by_role("button", name="Look at what it touches…").click()
        expect(dialog.get_by_role("alert")).to_contain_text("The spec is not JSON")
        dialog.get_by_label("Spec: interventions").fill('{"interventions": [{"artifact": "nothing-of-that-name"}]}')
        dialog.get_by_role("button", name="Look at what it touches…").click()
        dialog.get_by_role("button", name="Use it for every request").click()
        expect(dialog.get_by_role("alert")).to_contain_text("nothing-of-that-name")
        dialog.get_by_role("button", name="Back").click()
        dialog.get_by_label("None").check()
        dialog.get_by_role("button", name="Look at what it touches…").click()
        dialog.get_by_role("button", name="Take it away").click()
        expect(switches).to_contain_text("Taken away by owner,")
        assert owner.default_spec().spec is None
    finally:
        owner.clear_default_spec()


def test_what_graded_answers_were_stands_in_monitor(page: Page, owner: Client) -> None:
    owner.complete("Hello", max_tokens=4, steering="calm")
    end = time.monotonic() + GRADED_S
    while not any(one.get("artifact") == "calm@1" for one in owner.effects(group="artifact")["outcomes"]):
        assert time.monotonic() < end, "nothing was graded"
        time.sleep(0.05)
    room(page, "Monitor")
    outcomes = page.get_by_role("region", name="Outcomes")
    expect(outcomes.get_by_role("row", name="calm@1")).to_be_visible()
    expect(outcomes.get_by_text("By the grader refusal")).to_be_visible()
    assert axe_finds(page) == []
