"""The console's room of roll-outs: from two versions of a preset over an approval to the work on users, and back."""

import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect
from trimtab_client import Client

from scripts.browser import CHROMIUM
from server.rollouts.arms import place_of
from server.text.vocabulary import Vocabulary
from tests.e2e.browser import axe_finds, page_of
from tests.e2e.scripted_site import Site
from tests.e2e.test_console_access import room, unlocked
from tests.server.test_steering import _spec
from tests.vectors.making import metadata, vector_payload

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine; .ci/run installs it")
OWNER = "the-owner-s-key"
ASKED = 6
MEASURED_S = 60


def answer(vocabulary: Vocabulary) -> list[int]:
    return vocabulary.encode(" good day hello world", special_tokens=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("rollouts") / "site", answer, api_key=OWNER, outcome_sample=1.0)
    library = made.library()
    for number, name in enumerate(("calm", "calmer")):
        library.create(metadata(name), vector_payload(number, layers=(1,)))
        library.presets.create("tone", _spec(name))
    library.presets.set_alias("tone", "production", 1)
    library.close()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def owner(site: Site) -> Iterator[Client]:
    with Client(site.url, api_key=OWNER) as made:
        yield made


def asked_by_both_arms(owner: Client, rollout: str) -> None:
    """Each user is in one arm; as many answers of either, and all of them graded."""
    for n in range(ASKED):
        users = [f"user-{n}-{m}" for m in range(64)]
        inside = {user: place_of(rollout, f"default\nuser:{user}") < 0.5 for user in users}
        for candidate in (False, True):
            user = next(user for user in users if inside[user] is candidate)
            told = owner.complete("Hello", max_tokens=4, steering={"preset": "tone"}, user=user)
            assert told.steering.presets == {"preset": f"tone@{1 + candidate}"}
    end = time.monotonic() + MEASURED_S
    while sum(one["answers"] for one in owner.effects(group="arm", rollout=rollout)["outcomes"]) < 2 * ASKED:
        assert time.monotonic() < end, "not every answer was graded"
        time.sleep(0.05)


def test_from_two_versions_to_work_and_back(browser: Browser, site: Site, owner: Client) -> None:
    with page_of(browser, site.url) as page:
        unlocked(page, OWNER)
        room(page, "Roll-outs")
        expect(page.get_by_text("There are no roll-outs yet.")).to_be_visible()
        page.get_by_role("button", name="Start a roll-out…").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Name").select_option("tone")
        expect(dialog.get_by_label("Alias, whose version is stable")).to_have_value("production")
        expect(dialog.get_by_label("Candidate")).to_have_value("2")
        dialog.get_by_label("Shares of users, in percent").fill("50, much")
        dialog.get_by_role("button", name="Make the draft").click()
        expect(dialog.get_by_role("alert")).to_contain_text("“much” is no share.")
        dialog.get_by_label("Shares of users, in percent").fill("50, 100")
        dialog.get_by_label("Samples of each version").fill("5")
        assert axe_finds(page) == []
        dialog.get_by_role("button", name="Make the draft").click()
        state = page.get_by_role("region", name="State")
        expect(state).to_contain_text("draft")
        expect(state).to_contain_text("it acts on nothing until it is published")

        state.get_by_role("button", name="Publish…").click()
        page.get_by_role("dialog").get_by_role("button", name="Publish it").click()
        expect(state).to_contain_text("at work")
        expect(state).to_contain_text("Approved by default/owner.")
        expect(state).to_contain_text("step 2 of 2, 100 % of users")
        [rollout] = owner.rollouts()
        assert rollout.status == "published" and rollout.terms["steps"][0]["share"] == 0.5

        asked_by_both_arms(owner, rollout.id)
        state.get_by_role("button", name="Refresh").click()
        failing = page.get_by_role("region", name="Guard rails").get_by_role("row", name="errors")
        expect(failing).to_contain_text(f"{ASKED} / {ASKED}")
        both = page.get_by_role("region", name="Effects by arm").get_by_role("row", name="Answers graded by refusal")
        expect(both.get_by_role("cell").nth(1)).to_have_text(str(ASKED))
        expect(both.get_by_role("cell").nth(2)).to_have_text(str(ASKED))
        assert axe_finds(page) == []
        page.set_viewport_size({"width": 375, "height": 720})
        assert page.evaluate("document.documentElement.scrollWidth") <= 375

        state.get_by_role("button", name="Return…").click()
        page.get_by_role("dialog").get_by_label("Why").fill("too calm")
        assert axe_finds(page) == []
        page.get_by_role("dialog").get_by_role("button", name="Return it").click()
        expect(state).to_contain_text("Returned by owner")
        expect(state).to_contain_text("because too calm. Only version 1 acts.")
        assert owner.get_rollout(rollout.id).status == "returned"
        assert owner.complete("Hello", max_tokens=4, steering={"preset": "tone"}).steering.rollouts == []
        page.get_by_role("link", name="← All roll-outs").click()
        expect(page.get_by_role("row", name="tone@production")).to_contain_text("returned")
        assert axe_finds(page) == []


def test_the_room_is_for_operators(browser: Browser, site: Site, owner: Client) -> None:
    reader = owner.create_key("reader", roles=["infer", "metrics"])
    with page_of(browser, site.url) as page:
        unlocked(page, reader.key)
        room(page, "Roll-outs")
        expect(page.get_by_text("needs the role operate, which the key “reader” does not have")).to_be_visible()
