"""What answers were: in the receipt of a request that asks, and of a sample in production. What each text is was read
and said here by hand; the graders must agree."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from server.background.apart import apart
from server.effects import live_grading
from server.effects.live_grading import LiveGrading
from server.effects.metrics import OutcomeMetrics
from server.engines.data import CompareRequest, Comparison, Generation
from server.observability.metrics import Metrics
from server.requests.state import ServerState
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from steering.artifacts.payload import Payload
from steering.divergence import Divergence, ResidualShift
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from vectors.artifact import Metadata
from vectors.evaluate.graders import WholeGrader
from vectors.library import Library

ANSWERS = {
    "I'm sorry, but I cannot help with that.": "refused",
    "Mix the flour with warm water and bake it for an hour.": "answered",
    "The the the the the the the the the the the the": "broken",
    "Bread is made of flour, water, salt and yeast.": "answered",
}
FRENCH = "Le chien dort devant la maison de son maître."


class Writing(ScriptedEngine):
    """Steered or not, choice i of a request says text i. `excess` is what measuring finds of every steered one."""

    texts: list[str] = list(ANSWERS)
    excess = 0.0

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.script = lambda generation: vocabulary.encode(self.text_of(generation), special_tokens=False)

    def text_of(self, generation: Generation) -> str:
        return self.texts[int(generation.request_id.rpartition("-")[2]) % len(self.texts)]

    async def compare(self, request: CompareRequest) -> Comparison:
        count = len(request.token_ids) - request.prompt_length
        row = dict.fromkeys(Divergence.__dataclass_fields__, torch.zeros(count))
        total = Divergence(**{**row, "kl": torch.full((count,), 0.25), "other_entropy": torch.full((count,), 0.5),
                              "surprise": torch.full((count,), 0.5 + self.excess)})
        ones = torch.ones(count)
        return Comparison(total, (total,) * len(request.program.compiled), ResidualShift(ones, ones), exact=True)


@pytest.fixture
def engine(vocabulary: Vocabulary) -> Writing:
    return Writing(vocabulary)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", shadow_sample=1.0, shadow_budget=10.0,
                    outcome_sample=1.0, outcome_graders=("refusal", "language=fr"), keep_alive_s=0)


@pytest.fixture(autouse=True)
def _artifact(library: Library) -> None:
    library.create(Metadata(name="tone", kind="vector", op="add", site="resid_post", layers=[2]),
                   Payload.build("vector", {2: {"vector": torch.ones(8)}}))


async def ask(client: httpx.AsyncClient, steering: dict[str, Any], **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/chat/completions", json=chat(steering=steering, n=4, max_tokens=120, **fields))
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def said(receipt: dict[str, Any]) -> list[str]:
    return [choice["outcome"] for choice in receipt["outcomes"]["graders"][0]["choices"]]


async def test_the_receipt_says_what_the_answers_are(client: httpx.AsyncClient) -> None:
    receipt = (await ask(client, {"artifact": "tone", "report": "outcome"}))["steering"]
    assert said(receipt) == list(ANSWERS.values())
    graded = receipt["outcomes"]["graders"][0]
    assert receipt["outcomes"]["status"] == "graded" and receipt["outcomes"]["surprise"] is True
    assert graded["grader"] == "refusal" and graded["shares"] == {"refused": 0.25, "answered": 0.5, "broken": 0.25}
    assert [choice["success"] for choice in graded["choices"]] == [False, True, False, True]
    assert receipt["effects"]["choices"][0]["text"]["excess_surprise"] == 0
    plain = (await ask(client, {"artifact": "tone"}))["steering"]
    assert plain.get("outcomes") is None


async def test_an_untouched_answer_is_graded_by_its_text(client: httpx.AsyncClient) -> None:
    receipt = (await ask(client, {"report": "outcome"}))["steering"]
    assert said(receipt) == list(ANSWERS.values())
    assert receipt["outcomes"]["surprise"] is False and receipt["effects"]["status"] == "unsteered"


async def test_what_the_untouched_model_would_never_say_is_broken(client: httpx.AsyncClient, engine: Writing) -> None:
    engine.texts, engine.excess = ["Bread is made of flour, water, salt and yeast."], 3.0
    assert said((await ask(client, {"artifact": "tone", "report": "outcome"}))["steering"]) == ["broken"] * 4
    assert said((await ask(client, {"report": "outcome"}))["steering"]) == ["answered"] * 4


async def test_a_stream_says_the_same(client: httpx.AsyncClient) -> None:
    whole = (await ask(client, {"artifact": "tone", "report": "outcome"}))["steering"]
    async with client.stream("POST", "/v1/chat/completions", json=chat(
            steering={"artifact": "tone", "report": "outcome"}, n=4, max_tokens=120, stream=True)) as answer:
        events = [json.loads(line[6:]) async for line in answer.aiter_lines() if line.startswith("data: {")]
    assert events[-1]["steering"]["outcomes"] == whole["outcomes"]
    plain = await client.post("/v1/completions", json={"model": MODEL, "prompt": "Say", "n": 4, "max_tokens": 120,
                                                       "steering": {"artifact": "tone", "report": "outcome"}})
    assert plain.json()["steering"]["outcomes"] == whole["outcomes"]


async def test_the_graders_that_are_asked_for(client: httpx.AsyncClient, engine: Writing) -> None:
    engine.texts = [FRENCH, "The dog sleeps in front of the house of its master.", "{}", FRENCH]
    graders = ["language=fr", {"kind": "json_schema", "json_schema": {"type": "object"}}]
    found = (await ask(client, {"report": "outcome", "graders": graders}))["steering"]["outcomes"]["graders"]
    assert [one["grader"] for one in found] == ["language=fr", "json_schema"]
    assert [choice["outcome"] for choice in found[0]["choices"]] == ["wanted", "other", "broken", "wanted"]
    assert [choice["outcome"] for choice in found[1]["choices"]] == ["not_json", "not_json", "valid", "not_json"]


@pytest.mark.parametrize(("steering", "param", "word"), [
    ({"report": "outcome", "graders": ["refusal", "tone"]}, "steering.graders[1]", "docs/graders.md"),
    ({"report": "outcome", "graders": ["language=xx"]}, "steering.graders[0].language", "xx"),
    ({"report": "outcome", "graders": [{"kind": "length", "least": 1, "mots": 3}]}, "steering.graders[0].mots", ""),
    ({"report": "outcome", "graders": [{"kind": "probe", "probe": "tone", "threshold": 0}]}, "steering.graders[0]",
     "monitor"),
    ({"report": "outcome", "graders": [{"kind": "judge", "url": "http://127.0.0.1:1/v1", "model": "m", "question": "?",
                                        "labels": ["yes", "no"], "wanted": "yes"}]}, "steering.graders[0]",
     "/v1/evaluations"),
    ({"graders": ["refusal"]}, "steering", "outcome"),
    ({"report": "outcome", "graders": ["refusal"] * 5}, "steering.graders", "4"),
])
async def test_graders_that_cannot_be_asked_are_refused(client: httpx.AsyncClient, steering: dict[str, Any],
                                                        param: str, word: str) -> None:
    answer = await client.post("/v1/chat/completions", json=chat(steering=steering))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "invalid_spec" and error["param"] == param
    assert word in error["message"]


async def metrics(client: httpx.AsyncClient) -> dict[tuple[str, str, str, str], float]:
    """Answers by (artifact, preset, grader, outcome)."""
    found = {}
    for labels, value in re.findall(r"^trimtab_outcome_answers_total\{(.*)\} (\S+)$",
                                    (await client.get("/metrics")).text, re.MULTILINE):
        own = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[own["artifact"], own["preset"], own["grader"], own["outcome"]] = float(value)
    return found


async def settled(app: FastAPI) -> ServerState:
    state: ServerState = app.state.server
    await state.shadow.drained()
    await state.live_grading.drained()
    return state


async def test_a_sample_in_production_is_graded(client: httpx.AsyncClient, app: FastAPI) -> None:
    """Twelve answers with an artifact, four of a preset with it, eight without: what they are is counted by hand."""
    await client.post("/v1/presets", json={"name": "warm", "spec": {"interventions": [{"artifact": "tone"}]}})
    for _ in range(3):
        await ask(client, {"artifact": "tone"})
    await ask(client, {"preset": "warm"})
    for _ in range(2):
        await ask(client, {})
    await settled(app)
    found = await metrics(client)
    hand = {"refused": 1, "answered": 2, "broken": 1}
    for artifact in ("all", "tone@1"):
        for outcome, count in hand.items():
            assert found[artifact, "", "refusal", outcome] == 3 * count
            assert found[artifact, "warm@1", "refusal", outcome] == count
    assert {outcome: found["untouched", "", "refusal", outcome] for outcome in hand} == {
        outcome: 2 * count for outcome, count in hand.items()}
    body = (await client.get("/v1/effects", params={"group": "artifact"})).json()
    rows = {(row["artifact"], row["grader"]): row for row in body["outcomes"]}
    assert rows["tone@1", "refusal"]["answers"] == rows["all", "refusal"]["answers"] == 16
    assert rows["tone@1", "refusal"]["shares"] == {"refused": 0.25, "answered": 0.5, "broken": 0.25}
    assert rows["untouched", "language=fr"]["shares"] == {"other": 0.75, "broken": 0.25}
    by_preset = (await client.get("/v1/effects", params={"group": "preset", "artifact": "tone@1"})).json()["outcomes"]
    assert {(row["preset"], row["grader"]): row["answers"] for row in by_preset} == {
        ("", "refusal"): 12, ("", "language=fr"): 12, ("warm@1", "refusal"): 4, ("warm@1", "language=fr"): 4}


async def test_the_surprise_of_a_measured_answer_reaches_its_grading(client: httpx.AsyncClient, app: FastAPI,
                                                                     engine: Writing) -> None:
    engine.texts, engine.excess = ["Bread is made of flour, water, salt and yeast."], 3.0
    await ask(client, {"artifact": "tone"})
    await ask(client, {})
    await settled(app)
    found = await metrics(client)
    assert found["tone@1", "", "refusal", "broken"] == 4 and found["untouched", "", "refusal", "answered"] == 4


async def test_a_grader_that_fails_costs_gradings_alone(client: httpx.AsyncClient, app: FastAPI,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(grader: Any, ended: Any) -> Any:
        raise RuntimeError("no word list")

    monkeypatch.setattr(live_grading, "verdicts_on", fails)
    monkeypatch.setattr("server.effects.outcomes.verdicts_on", fails)
    await ask(client, {"artifact": "tone"})
    await settled(app)
    assert 'trimtab_outcome_dropped_total{reason="failed"} 4.0' in (await client.get("/metrics")).text
    monkeypatch.setattr(live_grading, "verdicts_on", lambda grader, ended: fails(grader, ended))
    told = (await ask(client, {"report": "outcome"}))["steering"]["outcomes"]
    assert told["status"] == "failed" and told["graders"] == []
    assert not await metrics(client)


async def test_no_request_waits_for_a_grading(client: httpx.AsyncClient, app: FastAPI,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Grading hangs: answers come all the same, what the queue has no room for is counted, and the rest is graded once
    it goes on."""
    hanging = asyncio.Event()

    async def hang(work: Any) -> Any:
        await hanging.wait()
        return work()

    state: ServerState = app.state.server
    monkeypatch.setattr(state.live_grading, "_apart", hang)
    monkeypatch.setattr(state.live_grading, "_queue", asyncio.Queue(2))
    await state.live_grading.stop()
    await state.live_grading.start()
    for _ in range(2):
        await ask(client, {"artifact": "tone"})
    await state.shadow.drained()
    page = (await client.get("/metrics")).text
    assert float(re.findall(r'trimtab_outcome_dropped_total\{reason="queue"\} (\S+)', page)[0]) >= 5
    hanging.set()
    await state.live_grading.drained()
    assert await metrics(client)


async def test_without_a_database_the_metrics_still_count(client: httpx.AsyncClient, app: FastAPI,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(store: Any, counts: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(live_grading, "write", gone)
    await ask(client, {})
    state = await settled(app)
    await state.live_grading.flush()
    assert (await metrics(client))["untouched", "", "refusal", "answered"] == 2
    assert "trimtab_outcome_records_lost_total 8.0" in (await client.get("/metrics")).text


@pytest.mark.parametrize(("sample", "measured"), [(0.1, 0.4), (0.4, 0.1), (0.3, 0.3), (0.0, 0.5), (1.0, 0.2)])
def test_the_share_that_is_graded_is_the_one_asked_for(sample: float, measured: float) -> None:
    """Whatever share is measured, and measured ones come first."""
    live = LiveGrading(OutcomeMetrics(Metrics().registry, MODEL), None, [WholeGrader()], apart, sample=sample,
                       measured=measured, seed=3)
    drawn = [(n < measured * 20_000, live.draws(steered=True, measured=n < measured * 20_000)) for n in range(20_000)]
    assert sum(graded for _, graded in drawn) / 20_000 == pytest.approx(sample, abs=0.015)
    first = sum(graded for was, graded in drawn if was) / 20_000
    assert first == pytest.approx(min(sample, measured), abs=0.015)
    untouched = sum(live.draws(steered=False, measured=False) for _ in range(20_000)) / 20_000
    assert untouched == pytest.approx(sample, abs=0.015)
