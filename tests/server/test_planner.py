"""What the planner keeps: weighed in bytes, read once, and never older than the library."""

from collections import Counter
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.requests.programs import program_bytes
from server.settings import Settings
from steering.language.scope import Scope
from steering.language.spec import Spec
from tests.server.conftest import MODEL, chat
from tests.server.scripted import WIDTH
from tests.server.test_steering import _spec as spec
from tests.server.test_steering import ask, refused, store
from tests.vectors.making import queries
from vectors.artifact import Patch
from vectors.calibration import Outcome, Setting
from vectors.library import Library, presets, switches

CACHE = 100_000


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"program_cache_bytes": CACHE})


def calibration(*kl: float) -> Setting:
    """Strengths 1, 2, 3... had these effects."""
    def point(strength: float, effect: float) -> Outcome:
        return Outcome(strength=strength, kl=effect, kl_error=0, perplexity=2, repetition=0, compression=1, length=9,
                       ended=1)

    return Setting(fingerprint="f" * 64, model_id=MODEL, op="add", sites=("resid_post",), layers=(2,),
                   options={"norm_match": False, "preserve_norm": False}, scope=Scope(), base=point(0, 0),
                   up=tuple(point(n, effect) for n, effect in enumerate(kl, 1)), prompts=1, max_tokens=9,
                   temperature=0, seed=0)


async def test_a_dose_goes_by_the_card_as_it_is_and_the_receipt_tells_which(client: httpx.AsyncClient,
                                                                            library: Library) -> None:
    store(library, "one")
    dose = {"interventions": [{"artifact": "one@1", "strength": {"kl": 0.5}}]}
    found = []
    for curve in ((0.25, 0.5, 1.0), (0.5, 1.0, 2.0), (0.25, 0.5, 1.0)):
        library.add_calibration("one@1", [calibration(*curve)])
        found.append([(await ask(client, dose))["steering"]["applied"][0] for _ in range(2)])
    scales = [{one["strength"]["scale"]["2"] for one in both} for both in found]
    assert scales == [{2.0}, {1.0}, {2.0}]
    cards = [{one["card"] for one in both} for both in found]
    assert all(len(both) == 1 for both in cards) and cards[0] == cards[2] != cards[1]
    library.patch("one@1", Patch(card=None))
    plain = (await ask(client, {"interventions": [{"artifact": "one@1"}]}))["steering"]["applied"][0]
    assert plain["card"] is None and await refused(client, dose) == (409, "not_calibrated",
                                                                     "steering.interventions[0].strength")


async def test_programs_are_weighed_not_counted(app: FastAPI, client: httpx.AsyncClient) -> None:
    """However much is asked for, what is kept fits, and a key holds none of it."""
    programs = app.state.server.planner.programs.kept
    for n in range(12):
        large = {"op": "add", "layers": [1], "inline": {"vector": [float(n + 1)] * WIDTH},
                 "scope": {"prompt": {"positions": [0] * 1000}}}
        await ask(client, {"interventions": [large]})
        assert 0 < programs.currsize <= CACHE
        assert programs.currsize == sum(map(program_bytes, programs.values()))
        assert all(len(key) == 64 for key in programs)
    assert 1 < len(programs) < 12


async def test_what_does_not_fit_is_compiled_all_the_same(app: FastAPI, client: httpx.AsyncClient) -> None:
    many = [{"op": "add", "layers": [1], "inline": {"vector": [1.0] * WIDTH}}] * 32
    assert len((await ask(client, {"interventions": many}))["steering"]["applied"]) == 32
    assert len(app.state.server.planner.programs.kept) == 0


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a stored spec was read and validated, by what it is."""
    counts: Counter[str] = Counter()
    for module, name in ((presets, "preset"), (switches, "default")):
        read = module.from_json

        def counted(document: str, what: str, read: Any = read, name: str = name) -> Any:
            counts[name] += 1
            return read(document, what)

        monkeypatch.setattr(module, "from_json", counted)
    return counts


async def test_a_preset_is_read_once_and_a_change_is_seen_at_once(client: httpx.AsyncClient, library: Library,
                                                                  readings: Counter[str]) -> None:
    async def applied(ref: str) -> tuple[str, str]:
        receipt = (await ask(client, {"preset": ref}))["steering"]
        return receipt["presets"]["preset"], receipt["applied"][0]["artifact"]

    for name in ("one", "two"):
        store(library, name)
    library.presets.create("mood", spec("one"))
    readings.clear()
    assert {await applied("mood") for _ in range(3)} == {("mood@1", "one@1")}
    assert readings["preset"] == 1
    library.presets.create("mood", spec("two"))
    assert await applied("mood") == ("mood@2", "two@1")
    library.presets.set_alias("mood", "production", 1)
    assert await applied("mood") == ("mood@1", "one@1")
    # The same content under another name is another preset.
    library.presets.create("other", spec("one"))
    assert await applied("other") == ("other@1", "one@1")
    library.presets.delete("mood", force=True)
    assert await refused(client, {"preset": "mood"}) == (404, "not_found", "steering.preset")
    body = chat() | {"model": f"{MODEL}:other"}
    assert (await client.post("/v1/chat/completions", json=body)).json()["steering"]["presets"] == {"model": "other@1"}


async def test_the_default_spec_is_read_once_and_a_change_is_seen_at_once(client: httpx.AsyncClient, library: Library,
                                                                          readings: Counter[str]) -> None:
    for name in ("one", "two"):
        store(library, name)
    library.switches.set_default_spec(spec("one"))
    readings.clear()
    for _ in range(3):
        assert (await ask(client))["steering"]["applied"][0]["artifact"] == "one@1"
    assert readings["default"] == 1
    library.switches.set_default_spec(spec("two"))
    assert (await ask(client))["steering"]["applied"][0]["artifact"] == "two@1"
    library.switches.clear_default_spec()
    assert (await ask(client))["steering"]["applied"] == []


async def test_a_request_that_names_what_was_named_before_asks_the_database_nothing(client: httpx.AsyncClient,
                                                                                   library: Library) -> None:
    store(library, "one")
    store(library, "two")
    library.presets.create("calm", Spec.model_validate({"interventions": [{"artifact": "two"}]}))
    library.switches.set_default_spec(Spec.model_validate({"interventions": [{"artifact": "one", "strength": 0.5}]}))
    # The time in which the database is not asked again never ends on its own here.
    library._database.revision._clock = lambda: 0.0
    steering = {"preset": "calm", "interventions": [{"artifact": "one"}]}
    with queries(library) as cold:
        first = (await ask(client, steering))["steering"]["applied"]
    with queries(library) as warm:
        assert (await ask(client, steering))["steering"]["applied"] == first
    assert len(first) == 3 and cold.count > 0
    # The kill switch follows what other processes store, whether requests come or not.
    assert [one for one in warm.statements if one != "BEGIN" and "FROM setting" not in one] == []
    store(library, "one", 9.0)
    with queries(library) as edited:
        applied = (await ask(client, steering))["steering"]["applied"]
    assert [item["artifact"] for item in applied] == ["one@2", "two@1", "one@2"] and edited.count > 0
