"""Both clients against the real app with the bundled model."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from trimtab_client import (
    AsyncClient,
    BadRequest,
    Client,
    Conflict,
    ConnectionFailed,
    Job,
    JobFailed,
    NotFound,
    ServerFailed,
)

from lab.datasets import load

MODEL = "lab-dense"
PROMPT = "How do I bake a cake?"
# d_model of lab-dense.
WIDTH = 128


# A plain prompt has no roles, which is noticed once the job runs.
OF_ROLES = {"interventions": [{"artifact": "french", "scope": {"prompt": {"roles": ["user"]}}}]}


@pytest.fixture(scope="module")
def client(lab_url: str) -> Iterator[Client]:
    with Client(lab_url) as made:
        yield made


def vector(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "kind": "vector", "op": "add", "site": "resid_post", **fields}


def numbers(seed: float) -> dict[int, dict[str, Any]]:
    return {2: {"vector": [seed + i / 7 for i in range(WIDTH)]}}


def test_models_health_and_capabilities(client: Client) -> None:
    client.health()
    assert client.models()[0] == MODEL
    assert client.capabilities()["d_model"] == WIDTH


def test_chat_carries_a_typed_receipt(client: Client) -> None:
    client.create_artifact(vector("client-push", strength={"value": 3.0, "unit": "raw"}), numbers(-9))
    plain = client.chat(PROMPT, max_tokens=12, temperature=0)
    steered = client.chat(PROMPT, steering="client-push", max_tokens=12, temperature=0)
    assert plain.steering.applied == []
    assert steered.text != plain.text
    (applied,) = steered.steering.applied
    assert (applied.artifact, applied.op, applied.layers) == ("client-push@1", "add", [2])
    assert applied.tokens.prompt == steered.usage.prompt_tokens
    # The last generated token is never fed back, so it is not touched.
    assert applied.tokens.generation == steered.usage.completion_tokens - 1


def test_a_receipt_can_be_had_later(client: Client) -> None:
    answer = client.complete("The sky", max_tokens=2, temperature=0)
    assert client.receipt(answer.id) == answer.steering
    with pytest.raises(NotFound):
        client.receipt("req-0")


def test_responses_are_kept_and_gone_on_from(client: Client) -> None:
    first = client.respond("The sky", max_output_tokens=4, temperature=0)
    assert client.response(first["id"])["output"] == first["output"] and first["steering"]["applied"] == []
    second = client.respond("And", previous_response_id=first["id"], max_output_tokens=2, temperature=0)
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert client.cancel_response(first["id"])["status"] == first["status"]
    client.delete_response(first["id"])
    with pytest.raises(NotFound):
        client.response(first["id"])


def test_tokens_there_and_back(client: Client) -> None:
    tokens = client.tokenize(prompt="The sky")
    assert client.complete(tokens, max_tokens=2, temperature=0).usage.prompt_tokens == len(tokens)
    assert client.detokenize(tokens).endswith("The sky")
    chat = client.tokenize("The sky")
    assert client.chat("The sky", max_tokens=1).usage.prompt_tokens == len(chat) > len(tokens)


def test_three_ways_to_write_steering_mean_the_same(client: Client) -> None:
    client.create_artifact(vector("client-ways"), numbers(-4))
    ways = ["client-ways", ["client-ways"], {"interventions": [{"artifact": "client-ways"}]}]
    texts = {client.complete("The sky", steering=way, max_tokens=10, temperature=0).text for way in ways}
    assert len(texts) == 1


def test_streams_join_to_the_whole_answer(client: Client) -> None:
    whole = client.chat(PROMPT, max_tokens=16, temperature=0)
    pieces = list(client.stream_chat(PROMPT, max_tokens=16, temperature=0))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert len(pieces) > 3
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason
    assert [piece.steering is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    plain = client.complete([5, 6, 7], max_tokens=6, temperature=0)
    assert "".join(p.text for p in client.stream_complete([5, 6, 7], max_tokens=6, temperature=0)) == plain.text


def test_library_round_trip(client: Client) -> None:
    first = client.create_artifact(vector("client-lib", tags=["one"]), numbers(1))
    second = client.create_artifact(vector("client-lib", tags=["two"]), numbers(2))
    assert (first.ref, second.ref, second.stored_layers) == ("client-lib@1", "client-lib@2", [2])
    assert [a.version for a in client.artifact_versions("client-lib").data] == [2, 1]
    assert client.set_alias("client-lib", "production", 1).aliases == ["production"]
    assert client.get_artifact("client-lib").version == 1
    with pytest.raises(Conflict) as refused:
        client.delete_artifact("client-lib")
    assert refused.value.status == 409
    client.remove_alias("client-lib", "production")
    assert client.get_artifact("client-lib").version == 2
    patched = client.patch_artifact("client-lib@1", description="old", card={"note": 1})
    assert (patched.description, patched.tags, patched.card) == ("old", ["one"], {"note": 1})
    file = client.download_artifact("client-lib@2")
    copy = client.import_artifact(file, {"name": "client-copy"})
    assert copy.digest == second.digest
    assert client.download_artifact("client-lib@2", format="gguf")[:4] == b"GGUF"
    assert sorted(client.delete_artifact("client-lib")) == ["client-lib@1", "client-lib@2"]
    with pytest.raises(NotFound):
        client.get_artifact("client-lib")


def test_lists_can_be_paged_and_filtered(client: Client) -> None:
    for n in range(3):
        client.create_artifact(vector(f"client-page-{n}", tags=["client-page"]), numbers(n))
    page = client.list_artifacts(tag="client-page", limit=2)
    assert [a.name for a in page.data] == ["client-page-0", "client-page-1"]
    rest = client.list_artifacts(tag="client-page", limit=2, cursor=page.cursor)
    assert [a.name for a in rest.data] == ["client-page-2"]
    assert rest.cursor is None


def test_presets_become_models(client: Client) -> None:
    client.create_artifact(vector("client-preset-vector"), numbers(-3))
    stored = client.create_preset("client-preset", {"interventions": [{"artifact": "client-preset-vector"}]}, "Text.")
    assert stored.model == f"{MODEL}:client-preset"
    assert stored.model in client.models()
    assert client.get_preset("client-preset@1").spec["interventions"][0]["artifact"] == "client-preset-vector"
    by_name = client.chat(PROMPT, model=stored.model, max_tokens=8, temperature=0)
    assert by_name.text == client.chat(PROMPT, steering="client-preset-vector", max_tokens=8, temperature=0).text
    assert client.set_preset_alias("client-preset", "live", 1).aliases == ["live"]
    client.remove_preset_alias("client-preset", "live")
    assert [p.version for p in client.preset_versions("client-preset").data] == [1]
    assert "client-preset" in [p.name for p in client.list_presets().data]
    assert client.delete_preset("client-preset") == ["client-preset@1"]


def test_refusals_are_typed_and_name_the_field(client: Client) -> None:
    with pytest.raises(BadRequest) as refused:
        client.chat(PROMPT, steering={"interventions": [{"artifact": "x", "typo": 1}]})
    error = refused.value
    assert (error.status, error.code, error.param) == (400, "invalid_spec", "steering.interventions[0].typo")
    assert error.request_id is not None
    with pytest.raises(NotFound) as missing:
        client.chat(PROMPT, steering="no-such-thing")
    assert missing.value.param == "steering.interventions[0].artifact"
    with pytest.raises(BadRequest):
        list(client.stream_chat(PROMPT, max_tokens=0))


@pytest.mark.parametrize("name", ["../../etc/passwd", "a?b", "%2e%2e"])
def test_names_cannot_leave_their_place_in_the_path(client: Client, name: str) -> None:
    with pytest.raises((BadRequest, NotFound)) as refused:
        client.get_artifact(name)
    assert refused.value.code in ("invalid_request", "route_not_found")


def test_a_name_with_a_slash_is_one_of_a_tenants_space(client: Client) -> None:
    with pytest.raises(NotFound) as refused:
        client.get_artifact("a/b")
    assert refused.value.code == "not_found"


def test_extraction_reports_progress_and_its_result(client: Client) -> None:
    seen: list[Job] = []
    pairs = [{key: record[key] for key in ("positive", "negative", "item", "split")} for record in load("sentiment")]
    found = client.extract(pairs, name="client-mood", layers=[2, 3], on_progress=seen.append)
    assert found.artifact == "client-mood@1"
    assert found.report["best_layer"] in (2, 3)
    assert seen[-1].status == "succeeded"
    assert [job.progress for job in seen] == sorted(job.progress for job in seen)
    assert client.get_artifact("client-mood").provenance["num_pairs"] == len(pairs)
    assert seen[-1].id in [job.id for job in client.jobs().data]


def test_a_job_that_fails_raises_with_its_code(client: Client) -> None:
    with pytest.raises(JobFailed) as failed:
        client.evaluate([PROMPT], [{"kind": "whole"}], spec=OF_ROLES, draws=0, max_tokens=2)
    assert failed.value.code == "invalid_spec"
    with pytest.raises(Conflict):
        client.cancel_job(failed.value.job_id)


def test_default_spec_and_kill_switch(client: Client) -> None:
    client.create_artifact(vector("client-default"), numbers(-2))
    try:
        client.set_default_spec({"interventions": [{"artifact": "client-default"}]})
        assert client.default_spec().spec is not None
        assert client.chat(PROMPT, max_tokens=2).steering.applied[0].source == "default"
        assert client.set_kill_switch(True).on
        held = client.chat(PROMPT, steering="client-default", max_tokens=2).steering
        assert held.disabled
        assert held.applied == []
    finally:
        client.set_kill_switch(False)
        client.clear_default_spec()
    assert not client.kill_switch().on
    assert client.default_spec().spec is None


async def test_the_async_client_does_the_same(lab_url: str, client: Client) -> None:
    client.create_artifact(vector("client-async"), numbers(-5))
    async with AsyncClient(lab_url) as awaited:
        await awaited.health()
        answer = await awaited.chat(PROMPT, steering="client-async", max_tokens=10, temperature=0)
        assert answer.text == client.chat(PROMPT, steering="client-async", max_tokens=10, temperature=0).text
        pieces = [piece async for piece in awaited.stream_chat(PROMPT, steering="client-async", max_tokens=10,
                                                               temperature=0)]
        assert "".join(piece.text for piece in pieces) == answer.text
        assert pieces[-1].steering == answer.steering
        with pytest.raises(NotFound):
            await awaited.get_artifact("client-nothing")
        with pytest.raises(BadRequest):
            async for _ in awaited.stream_chat(PROMPT, max_tokens=0):
                pass
        with pytest.raises(JobFailed):
            await awaited.evaluate([PROMPT], [{"kind": "whole"}], spec=OF_ROLES, draws=0, max_tokens=2)
        with pytest.raises(BadRequest) as few:
            await awaited.extract([{"positive": f"Good {n}.", "negative": f"Bad {n}."} for n in range(3)], name="few")
        assert (few.value.code, few.value.param) == ("too_few_pairs", "pairs")


def answering(status: int, content: bytes) -> httpx.MockTransport:
    return httpx.MockTransport(lambda request: httpx.Response(status, content=content))


@pytest.mark.parametrize(("status", "content"), [(502, b"<html>Bad gateway</html>"), (404, b'{"detail": "x"}'),
                                                 (200, b"<html>Sign in</html>"), (200, b"{}")])
def test_what_is_no_trimtab_server_is_said_to_be_none(status: int, content: bytes) -> None:
    http = httpx.Client(transport=answering(status, content), base_url="http://elsewhere")
    with pytest.raises(ConnectionFailed):
        Client(http=http).get_artifact("x")


def test_nobody_there() -> None:
    with pytest.raises(ConnectionFailed, match="no answer of GET http://127.0.0.1:1/health/ready"):
        Client("http://127.0.0.1:1").health()


def test_the_key_is_sent() -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json={"data": [{"id": "m"}]})

    made = Client("http://elsewhere", api_key="s3cret")
    made._http._transport = httpx.MockTransport(answer)
    assert made.models() == ["m"]
    assert seen == ["Bearer s3cret"]


def test_an_error_inside_a_stream_is_raised() -> None:
    body = (b'data: {"choices": [{"index": 0, "delta": {"content": "He"}}]}\n\n'
            b'data: {"error": {"message": "gone", "type": "x", "param": null, "code": "internal_error"}}\n\n')
    http = httpx.Client(transport=answering(200, body), base_url="http://elsewhere")
    pieces = Client(http=http).stream_chat("Hi", model="m")
    assert next(pieces).text == "He"
    with pytest.raises(ServerFailed, match="gone"):
        next(pieces)
