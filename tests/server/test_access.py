"""The key, health, metrics, request ids."""

import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from server.observability.metrics import MAX_ARTIFACT_LABELS, OTHER, Metrics
from server.settings import Settings
from steering.programs.program import Applied
from tests.server.conftest import chat
from tests.server.scripted import ScriptedEngine

OPEN = ("/health", "/health/ready")
CLOSED = ("/docs", "/openapi.json", "/nowhere", "/v1/models", "/v1/artifacts", "/v1/presets", "/v1/jobs",
          "/v1/capabilities", "/v1/admin/kill-switch", "/metrics", "/v1/spec/schema")


class TestWithKey:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"api_key": SecretStr("sesame-\u00e9")})

    async def test_only_health_is_open(self, client: httpx.AsyncClient) -> None:
        for path in OPEN:
            assert (await client.get(path)).status_code == 200
        for path in CLOSED:
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
            assert answer.headers["www-authenticate"] == ("Basic" if path in ("/docs", "/openapi.json") else "Bearer")

    @pytest.mark.parametrize(("header", "status"), [
        ("Bearer sesame-\u00e9", 200), ("bearer sesame-\u00e9", 200), ("Bearer sesame", 401), ("Bearer", 401),
        ("Basic sesame-\u00e9", 401), ("sesame-\u00e9", 401), ("Bearer sesame-\u00e9x", 401)])
    async def test_the_key(self, client: httpx.AsyncClient, header: str, status: int) -> None:
        answer = await client.get("/v1/models", headers={"Authorization": header.encode()})
        assert answer.status_code == status


async def test_ready_follows_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await client.get("/health/ready")).status_code == 200
    await engine.stop()
    assert (await client.get("/health/ready")).status_code == 503
    assert (await client.get("/health")).status_code == 200


async def test_polls_of_an_engine_that_is_away_are_one_line(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    with capture_logs() as logged:
        for _ in range(3):
            await client.get("/health/ready")
        await engine.stop()
        for _ in range(3):
            assert (await client.get("/health/ready")).status_code == 503
        await engine.start()
        for _ in range(3):
            await client.get("/health/ready")
    assert [(line["route"], line["status"], line.get("code")) for line in logged] == [
        ("/health/ready", 503, "engine_unavailable"), ("/health/ready", 200, None)]


async def test_a_refusal_is_one_line_that_says_why(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.full = True
    with capture_logs() as logged:
        await client.post("/v1/chat/completions", json=chat())
        await client.post("/v1/chat/completions", json=chat(n=0))
    assert [(line["log_level"], line["status"], line["code"]) for line in logged] == [
        ("warning", 503, "slots_exhausted"), ("info", 400, "invalid_request")]
    assert "slots" in logged[0]["message"] and "message" not in logged[1]


async def test_metrics(client: httpx.AsyncClient) -> None:
    steering = {"interventions": [{"op": "add", "inline": {"vector": {"1": [1.0] * 8}}}]}
    await client.post("/v1/chat/completions", json=chat(steering=steering))
    await client.post("/v1/chat/completions", json=chat(audio={"voice": "x"}))
    await client.get("/v1/artifacts/nobody-has-this")
    await client.get("/nowhere/at/all")
    text = (await client.get("/metrics")).text
    for line in ('trimtab_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0',
                 'trimtab_requests_total{method="GET",route="unmatched",status="404"} 1.0',
                 'trimtab_refusals_total{code="unsupported_parameter"} 1.0', "trimtab_steered_requests_total 1.0",
                 'trimtab_artifact_uses_total{artifact="inline",op="add"} 1.0', "trimtab_prompt_tokens_total 6.0",
                 "trimtab_generated_tokens_total 3.0", "trimtab_time_to_first_token_seconds_count 1.0",
                 "trimtab_time_per_output_token_seconds_count 1.0", 'trimtab_engine{stat="slots_total"} 4.0'):
        assert line in text.splitlines(), line
    assert "nobody-has-this" not in text and "nowhere" not in text


def test_artifact_labels_are_bounded() -> None:
    metrics = Metrics()
    for i in range(MAX_ARTIFACT_LABELS + 50):
        metrics.admitted(1, [Applied(f"a{i}@1", "add", ("resid_post",), (1,), {}, {})], suppressed=False)
    labels = {sample.labels["artifact"] for family in metrics.registry.collect()
              for sample in family.samples if sample.name == "trimtab_artifact_uses_total"}
    assert len(labels) == MAX_ARTIFACT_LABELS + 1 and OTHER in labels


async def test_every_response_has_an_id_of_its_own(client: httpx.AsyncClient) -> None:
    answers = [await client.get(path) for path in ("/health", "/health", "/nope", "/v1/artifacts/nil")]
    assert len({a.headers["x-request-id"] for a in answers}) == 4


async def test_capabilities_and_schema(client: httpx.AsyncClient) -> None:
    found = (await client.get("/v1/capabilities")).json()
    assert found["sites"]["resid_post"]["layers"] == [0, 1, 2, 3]
    assert "resid_post" in found["ops"]["add"]["sites"] and found["limits"]["n"] == 4
    schema = (await client.get("/v1/spec/schema")).json()
    assert schema["$ref"] == "#/$defs/Steering" and "interventions" in schema["$defs"]["Steering"]["properties"]
    assert schema["x-options"]["add"] == {"$ref": "#/$defs/AddOptions"}
