"""Traces: one trace from the head of a request to its measurement, in what callers and receivers understand; and a
receiver that is away, or a package that is not installed, changes no answer."""

import asyncio
import sys
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.errors import InvalidSettings
from server.observability import tracing
from server.observability.export import open_tracing
from server.observability.tracing import RequestSpan, Tracing, record, traced
from server.settings import Settings, load_settings
from server.text.vocabulary import Vocabulary
from tests.server.conftest import chat
from tests.server.scripted import ScriptedEngine
from vectors.library import Library

STEERED = {"interventions": [{"op": "add", "layers": [1], "inline": {"vector": [1.0] * 8}}]}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"shadow_sample": 1.0, "shadow_budget": 10.0, "outcome_sample": 1.0,
                                       "trace_endpoint": "http://127.0.0.1:9"})


class TestSpans:
    """With an exporter that keeps them."""

    @pytest.fixture
    def spans(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        export = pytest.importorskip("opentelemetry.sdk.trace.export")
        memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
        from server.observability.spans import Unfolding

        monkeypatch.setattr("server.app.open_tracing",
                            lambda *_: Tracing(export.SimpleSpanProcessor(Unfolding(memory))))
        return memory

    @pytest.fixture
    def app(self, spans: Any, settings: Settings, engine: ScriptedEngine, library: Library, vocabulary: Vocabulary
            ) -> FastAPI:
        return create_app(settings, engine, library, vocabulary, engine_name="scripted")

    async def test_one_trace_from_the_head_to_the_measurement(
            self, client: httpx.AsyncClient, app: FastAPI, spans: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        state = app.state.server
        shift = SimpleNamespace(kl=SimpleNamespace(mean=0.25))
        effect: Any = SimpleNamespace(
            index=0, total=SimpleNamespace(kl=shift.kl, top1_changed=0.5), tokens=4, model_dump=lambda: {},
            text=SimpleNamespace(repetition=0.125, excess_surprise=0.0),
            interventions=[SimpleNamespace(artifact="calm@1", op="add", shift=shift)])

        async def compared(*_: object) -> Any:
            return SimpleNamespace(rerun=None)

        # The script has no distributions to compare; what is told of them is what is tried here.
        monkeypatch.setattr("server.effects.shadow.compare_parts", compared)
        monkeypatch.setattr("server.effects.shadow.choice_effect", lambda *_, **__: effect)
        monkeypatch.setattr(state.shadow, "_keep", lambda *_: None)
        monkeypatch.setattr(state.shadow._metrics, "measured", lambda *_: None)
        answer = await client.post("/v1/chat/completions", json=chat("secret words", steering=STEERED),
                                   headers={"traceparent": PARENT, "tracestate": "vendor=1"})
        await state.shadow.drained()
        await state.live_grading.drained()
        found = {span.name: span for span in spans.get_finished_spans()}
        assert set(found) == {"POST /v1/chat/completions", "chat tiny", "engine.queue", "engine.prefill",
                              "engine.decode", "effect.measure", "outcome.grade"}
        server = found.pop("POST /v1/chat/completions")
        assert server.kind.name == "SERVER" and format(server.parent.span_id, "016x") == PARENT.split("-")[2]
        assert format(server.context.trace_id, "032x") == PARENT.split("-")[1]
        assert answer.headers["traceresponse"] == f"{PARENT[:36]}{server.context.span_id:016x}-01"
        for span in found.values():
            assert (span.context.trace_id, span.parent.span_id) == (server.context.trace_id, server.context.span_id)
            assert span.start_time <= span.end_time
        assert server.attributes["http.response.status_code"] == 200
        assert server.attributes["trimtab.request_id"] == answer.headers["X-Trimtab-Request"]
        told, usage = found["chat tiny"].attributes, answer.json()["usage"]
        assert (told["gen_ai.operation.name"], told["gen_ai.request.model"]) == ("chat", "tiny")
        assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (
            usage["prompt_tokens"], usage["completion_tokens"])
        assert told["trimtab.artifacts"] == ("inline",)
        events = [(event.name, dict(event.attributes)) for event in found["effect.measure"].events]
        assert events[0] == ("gen_ai.evaluation.result", {"gen_ai.evaluation.name": "trimtab.kl",
                                                          "gen_ai.evaluation.score.value": 0.25})
        assert events[-1][1]["trimtab.artifact"] == "calm@1" and len(events) == 4
        [graded] = found["outcome.grade"].events
        assert graded.attributes["gen_ai.evaluation.name"] == "refusal"
        assert graded.attributes["gen_ai.evaluation.score.label"] in ("answered", "refused", "broken")
        assert "secret words" not in "".join(span.to_json() for span in spans.get_finished_spans())

    async def test_each_request_has_a_trace_of_its_own_and_says_what_went_wrong(self, client: httpx.AsyncClient,
                                                                                spans: Any) -> None:
        async with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
            assert [line async for line in answer.aiter_lines() if line][-1] == "data: [DONE]"
        await client.post("/v1/chat/completions", json=chat(temperature=9), headers={"traceparent": "rubbish"})
        await client.get("/metrics")
        await client.get("/health/ready")
        found = [span for span in spans.get_finished_spans() if span.kind.name == "SERVER"]
        assert [span.name for span in found] == ["POST /v1/chat/completions"] * 2
        assert len({span.context.trace_id for span in found}) == 2 and not any(span.parent for span in found)
        assert found[1].attributes["trimtab.code"] and found[1].attributes["http.response.status_code"] == 400

    async def test_a_caller_that_does_not_trace_is_not_traced(self, client: httpx.AsyncClient, spans: Any) -> None:
        await client.post("/v1/chat/completions", json=chat(), headers={"traceparent": f"{PARENT[:-2]}00"})
        assert spans.get_finished_spans() == ()

    async def test_a_trace_that_fails_fails_no_request(self, client: httpx.AsyncClient, spans: Any,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object, **__: object) -> None:
            raise ValueError("no spans today")

        monkeypatch.setattr(RequestSpan, "add", broken)
        assert (await client.post("/v1/chat/completions", json=chat())).status_code == 200


def test_what_is_not_sampled_is_not_even_put_together() -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    ended: list[Any] = []
    processor: Any = SimpleNamespace(on_end=ended.append)
    for sample in (0, 1):
        with Tracing(processor, float(sample)).request("POST", {}, {}) as span:
            assert traced() is bool(sample) and span.header.endswith(f"-0{sample}")
            record("part", 1)
        assert len(ended) == sample and not traced()


def test_the_share_that_is_traced_is_the_one_of_the_setting_and_a_callers_decision_holds() -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    ended: list[Any] = []
    processor: Any = SimpleNamespace(on_end=ended.append)
    tracing = Tracing(processor, 0.25)

    def ask(headers: dict[str, str]) -> None:
        with tracing.request("POST", headers, {}):
            pass

    for _ in range(4000):
        ask({})
    # Five standard errors of a share of a quarter.
    assert abs(len(ended) - 1000) < 5 * 27.4
    for flags, more in (("00", 0), ("01", 100)):
        before = len(ended)
        for _ in range(100):
            ask({"traceparent": f"{PARENT[:-2]}{flags}"})
        assert len(ended) - before == more


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))  # type: ignore[attr-defined]
        self.server.told.set()  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


async def test_spans_reach_a_receiver_of_otlp_by_the_end_of_the_server(
        settings: Settings, engine: ScriptedEngine, library: Library, vocabulary: Vocabulary) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    receiver = HTTPServer(("127.0.0.1", 0), Receiver)
    receiver.bodies, receiver.told = [], Event()  # type: ignore[attr-defined]
    thread = Thread(target=receiver.serve_forever, args=(0.02,))
    thread.start()
    try:
        chosen = settings.model_copy(update={"trace_endpoint": f"http://127.0.0.1:{receiver.server_port}/"})
        app = create_app(chosen, engine, library, vocabulary, engine_name="scripted")
        async with app.router.lifespan_context(app), httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=30) as client:
            assert (await client.post("/v1/chat/completions", json=chat())).status_code == 200
        assert await asyncio.to_thread(receiver.told.wait, 60)  # type: ignore[attr-defined]
    finally:
        receiver.shutdown()
        thread.join()
        receiver.server_close()
    bodies = receiver.bodies  # type: ignore[attr-defined]
    assert {path for path, _ in bodies} == {"/v1/traces"}
    sent = b"".join(body for _, body in bodies)
    assert b"chat tiny" in sent and b"engine.decode" in sent and b"trimtab" in sent


async def test_a_queue_that_is_full_drops_spans_and_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    exporter = pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter
    began, go_on = Event(), Event()

    def stuck(self: Any, spans: Any) -> Any:
        began.set()
        go_on.wait(60)
        return pytest.importorskip("opentelemetry.sdk.trace.export").SpanExportResult.FAILURE

    monkeypatch.setattr(exporter, "export", stuck)
    monkeypatch.setattr(tracing, "STOP_S", 0.1)
    made = open_tracing("http://127.0.0.1:9", 1.0, 4)
    assert made is not None

    def ask() -> None:
        for _ in range(100):
            with made.request("GET", {}, {}):
                record("part", 1)

    ask()
    assert await asyncio.to_thread(began.wait, 60)
    # Nothing takes them, and nothing waits.
    ask()
    await made.stop()
    go_on.set()


def test_a_request_has_so_many_parts_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    monkeypatch.setattr(tracing, "MOST_PARTS", 3)
    ended: list[Any] = []
    processor: Any = SimpleNamespace(on_end=ended.append)
    with Tracing(processor).request("GET", {}, {}):
        for number in range(10):
            record(str(number), 1)
    assert [part.name for part in ended[0].parts] == ["0", "1", "2"]


class TestAlike:
    """The same requests on a server without tracing, on one whose receiver is away, and without the package."""

    @pytest.fixture(params=["none", "away", "not installed"])
    async def answers(self, request: pytest.FixtureRequest, settings: Settings, tmp_path: Path, library: Library,
                      vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Any]]:
        if request.param == "away":
            pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
        else:
            settings = settings.model_copy(update={"trace_endpoint": None})
        if request.param == "not installed":
            hidden(monkeypatch)
        app = create_app(settings, ScriptedEngine(vocabulary), library, vocabulary, engine_name="scripted")
        async with app.router.lifespan_context(app), httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=30) as client:
            found = []
            for body in (chat(), chat(steering=STEERED), chat(temperature=9)):
                answer = await client.post("/v1/chat/completions", json=body)
                assert ("traceresponse" in answer.headers) == (request.param == "away")
                told = {name: value for name, value in answer.json().items() if name not in ("id", "created")}
                found.append((answer.status_code, told))
            await app.state.server.shadow.drained()
        yield found

    async def test_answers_are_alike(self, answers: list[Any]) -> None:
        assert [status for status, _ in answers] == [200, 200, 400]
        assert answers[0][1]["choices"][0]["message"]["content"] == " good day"
        assert answers[1][1]["steering"]["applied"] and "steering" in answers[0][1]


def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if OpenTelemetry were not there: what is loaded of it is gone, and its import fails."""
    for name in [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)


def test_the_package_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden(monkeypatch)
    assert open_tracing(None, 1.0, 1) is None
    with pytest.raises(InvalidSettings, match="not installed") as caught:
        open_tracing("http://127.0.0.1:9", 1.0, 1)
    assert caught.value.fix is not None and "trimtab[otel]" in caught.value.fix
    with pytest.raises(InvalidSettings):
        load_settings(trace_endpoint="collector:4318")
