"""What programs ask a server beside completions, and how they may write it."""

import gzip
import json
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr, ValidationError

from server.engines.data import Condition
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedCompletion, ScriptedEngine
from vectors.library import Library

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/health/live", "/ping"])
async def test_health_may_be_asked_without_a_body(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    assert (await client.head(path)).status_code == (await client.get(path)).status_code == 200
    engine.state = Condition(ready=False, live=False, reason="hung")
    assert (await client.head(path)).status_code == (200 if path == "/health" else 503)


async def test_ping_as_hosts_of_models_ask_it(client: httpx.AsyncClient) -> None:
    assert (await client.post("/ping")).status_code == 200


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json()["version"][0].isdigit()


@pytest.mark.parametrize("path", [CHAT, "/v1/models", f"/v1/models/{MODEL}", "/health"])
async def test_a_slash_at_the_end_changes_nothing(client: httpx.AsyncClient, path: str) -> None:
    async def ask(path: str) -> int:
        answer = await (client.post(path, json=chat()) if path.startswith(CHAT) else client.get(path))
        return answer.status_code

    assert await ask(path) == await ask(f"{path}/") == 200
    assert (await client.get(f"{path}//")).status_code == 404


class TestSeveralNames:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"served_model_aliases": ("gpt-4o", "org/other:v1")})

    async def test_one_model_answers_to_each_and_is_known_by_the_first(self, client: httpx.AsyncClient) -> None:
        spec = {"interventions": [{"op": "add", "layers": [1], "inline": {"vector": [1.0] * 8}}]}
        assert (await client.post("/v1/presets", json={"name": "mild", "spec": spec})).status_code == 201
        listed = [one["id"] for one in (await client.get("/v1/models")).json()["data"]]
        assert listed == [MODEL, "gpt-4o", "org/other:v1", f"{MODEL}:mild"]
        for name in ("gpt-4o", "org/other:v1"):
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
            for asked, steered in ((name, 0), (f"{name}:mild", 1)):
                answer = await client.post("/v1/chat/completions", json=chat(model=asked))
                assert answer.status_code == 200 and answer.json()["model"] == asked
                assert len(answer.json()["steering"]["applied"]) == steered
        assert (await client.get("/v1/presets/mild")).json()["model"] == f"{MODEL}:mild"
        for unknown in ("gpt-4", "gpt-4o:", "org/other"):
            assert (await client.post("/v1/chat/completions", json=chat(model=unknown))).status_code == 404


async def test_models_say_since_when_they_are(client: httpx.AsyncClient, settings: Settings) -> None:
    listed = (await client.get("/v1/models")).json()["data"][0]
    assert listed == (await client.get(f"/v1/models/{MODEL}")).json()
    described = Path(settings.model) / "config.json"
    assert abs(listed["created"] - (described.stat().st_mtime if described.exists() else time.time())) < 3600
    assert listed["max_model_len"] == 256


class TestTokens:
    async def test_a_prompt_has_the_tokens_that_a_completion_has(
            self, client: httpx.AsyncClient, vocabulary: Vocabulary, engine: ScriptedEngine) -> None:
        await client.post(COMPLETE, json={"model": MODEL, "prompt": "hé 🙂", "max_tokens": 1})
        for path in ("/v1/tokenize", "/tokenize"):
            found = (await client.post(path, json={"prompt": "hé 🙂", "return_token_strs": True})).json()
            assert found["tokens"] == engine.completions[0].generation.prompt_ids
            assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 256)
            assert found["token_strs"] == [vocabulary.token_text(i) for i in found["tokens"]]
        plain = (await client.post("/v1/tokenize", json={"prompt": "hi", "add_special_tokens": False})).json()
        assert plain["tokens"] == vocabulary.encode("hi", special_tokens=False) and "token_strs" not in plain

    async def test_a_conversation_has_those_of_a_chat(self, client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        await client.post(CHAT, json=chat())
        body = {"model": MODEL, "messages": chat()["messages"]}
        found = (await client.post("/v1/tokenize", json=body)).json()["tokens"]
        assert found == engine.completions[0].generation.prompt_ids
        closed = (await client.post("/v1/tokenize", json={**body, "add_generation_prompt": False})).json()["tokens"]
        assert closed == found[:len(closed)] and len(closed) < len(found)

    async def test_back_to_text(self, client: httpx.AsyncClient) -> None:
        tokens = (await client.post("/v1/tokenize", json={"messages": chat()["messages"]})).json()["tokens"]
        for path in ("/v1/detokenize", "/detokenize"):
            text = (await client.post(path, json={"model": MODEL, "tokens": tokens})).json()["prompt"]
            assert "hi" in text and text.startswith("<")

    @pytest.mark.parametrize(("path", "body", "status", "param"), [
        ("tokenize", {}, 400, "body"), ("tokenize", {"prompt": "a", "messages": []}, 400, "messages"),
        ("tokenize", {"prompt": "a" * (2**20 + 1)}, 413, "prompt"),
        ("tokenize", {"prompt": "a", "model": "x"}, 404, "model"),
        ("detokenize", {"tokens": [5, 10**6]}, 400, "tokens[1]"), ("detokenize", {"tokens": []}, 400, "tokens"),
        ("embeddings", {"model": MODEL, "input": "a"}, 400, "model")])
    async def test_refusals(self, client: httpx.AsyncClient, path: str, body: Any, status: int, param: str) -> None:
        answer = await client.post(f"/v1/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


async def test_embeddings_are_refused_by_a_code_of_their_own(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/embeddings", json={"model": MODEL, "input": "a"})
    assert answer.json()["error"]["code"] == "embeddings_unsupported"


@pytest.mark.parametrize("body", [chat("x" * 300), chat(max_tokens=255), chat("x" * 100_000)])
async def test_context_errors_are_known_by_their_words(client: httpx.AsyncClient, body: Any) -> None:
    error = (await client.post(CHAT, json=body)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 256 tokens" in error["message"]


class TestUsage:
    async def test_cached_tokens_are_told_where_the_engine_knows(self, client: httpx.AsyncClient,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
        async def usage(path: str, **fields: Any) -> Any:
            body = chat(**fields) if path == CHAT else {"model": MODEL, "prompt": ["ab", "abc"], **fields}
            answer = await client.post(path, json=body)
            if "stream" not in fields:
                return answer.json()["usage"]
            events = [line for line in answer.text.splitlines() if line.startswith("data: {")]
            return json.loads(events[-1][6:])["usage"]

        assert "prompt_tokens_details" not in await usage(CHAT)
        monkeypatch.setattr(ScriptedCompletion, "cached", lambda self: len(self.generation.prompt_ids) - 1)
        for path, prompts in ((CHAT, 1), (COMPLETE, 2)):
            for fields in ({"n": 2}, {"n": 2, "stream": True, "stream_options": {"include_usage": True}}):
                found = await usage(path, **fields)
                assert found["prompt_tokens_details"]["cached_tokens"] == found["prompt_tokens"] - prompts


async def test_the_fingerprint_changes_with_what_the_server_does_of_itself(client: httpx.AsyncClient, library: Library
                                                                          ) -> None:
    async def fingerprint(**steering: Any) -> str:
        body = chat(steering=steering)
        answer = await client.post(CHAT, json=body)
        streamed = await client.post(CHAT, json={**body, "stream": True})
        first = json.loads(streamed.text.splitlines()[0][6:])
        plain = await client.post(COMPLETE, json={"model": MODEL, "prompt": "hi"})
        found = {one["system_fingerprint"] for one in (answer.json(), first, plain.json())}
        assert len(found) == 1 and min(found).startswith("fp_")
        return found.pop()

    async def make(number: float) -> None:
        answer = await client.post("/v1/artifacts", json={"tensors": {"1": {"vector": [number] * 8}}, "metadata": {
            "name": "calm", "kind": "vector", "op": "add", "site": "resid_post"}})
        assert answer.status_code == 201, answer.text

    vector = {"op": "add", "inline": {"vector": {"1": [1.0] * 8}}}
    bare = await fingerprint()
    assert await fingerprint(interventions=[vector]) == bare
    await make(1)
    await client.put("/v1/admin/default-spec", json={"interventions": [{"artifact": "calm"}]})
    first = await fingerprint()
    assert first not in (bare,) and await fingerprint(default="none") == first
    await make(2)
    assert await fingerprint() not in (bare, first)
    await client.put("/v1/admin/kill-switch", json={"on": True})
    assert await fingerprint() == bare


class TestGzip:
    async def send(self, client: httpx.AsyncClient, content: bytes, encoding: str = "gzip") -> httpx.Response:
        return await client.post(CHAT, content=content, headers={"Content-Type": "application/json",
                                                                 "Content-Encoding": encoding})

    async def test_a_body_may_be_compressed(self, client: httpx.AsyncClient) -> None:
        body = json.dumps(chat()).encode()
        plain = (await client.post(CHAT, json=chat())).json()["choices"]
        two = gzip.compress(body[:9]) + gzip.compress(body[9:])
        for packed, encoding in ((gzip.compress(body), "gzip"), (two, "GZIP"), (body, "identity")):
            assert (await self.send(client, packed, encoding)).json()["choices"] == plain

    async def test_it_is_bounded_by_what_it_inflates_to(self, client: httpx.AsyncClient, settings: Settings) -> None:
        bomb = gzip.compress(b" " * (settings.max_body_bytes + 1))
        assert len(bomb) < settings.max_body_bytes // 100
        answer = await self.send(client, bomb)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
        several = gzip.compress(b" " * (settings.max_body_bytes // 2)) * 3
        assert (await self.send(client, several)).status_code == 413
        exact = json.dumps(chat()).encode()
        fits = gzip.compress(exact + b" " * (settings.max_body_bytes - len(exact)))
        assert (await self.send(client, fits)).status_code == 200

    @pytest.mark.parametrize(("content", "encoding", "code"), [
        (b"{}", "gzip", "invalid_json"), (gzip.compress(b"{}" * 99, mtime=0)[:-9], "gzip", "invalid_json"),
        (zlib.compress(b"{}"), "deflate", "unsupported_media_type"), (b"{}", "gzip, br", "unsupported_media_type")])
    async def test_what_is_none_is_refused(self, client: httpx.AsyncClient, content: bytes, encoding: str, code: str
                                          ) -> None:
        answer = await self.send(client, content, encoding)
        assert answer.json()["error"]["code"] == code


class TestOtherSites:
    PAGE = {"Origin": "https://app.example"}
    ASKS = {**PAGE, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"}

    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("k"),
                        cors_origins=("https://app.example",))

    async def test_a_browser_is_told_before_the_key(self, client: httpx.AsyncClient) -> None:
        asked = await client.options(CHAT, headers=self.ASKS)
        assert asked.status_code == 200
        assert asked.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert "authorization" in asked.headers["Access-Control-Allow-Headers"]
        refused = await client.post(CHAT, json=chat(), headers=self.PAGE)
        assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, "https://app.example")
        answer = await client.post(CHAT, json=chat(), headers={**self.PAGE, "Authorization": "Bearer k"})
        assert answer.status_code == 200 and "X-Trimtab-Applied" in answer.headers["Access-Control-Expose-Headers"]

    async def test_others_are_told_nothing(self, client: httpx.AsyncClient) -> None:
        other = {**self.ASKS, "Origin": "https://evil.example"}
        assert "Access-Control-Allow-Origin" not in (await client.options(CHAT, headers=other)).headers

    def test_settings(self) -> None:
        for wrong in ("*", "app.example", "https://app.example/", "https://App.example"):
            with pytest.raises(ValidationError, match="cors_origins"):
                Settings(cors_origins=(wrong,))
        assert Settings(cors_origins=("*",), api_key=SecretStr("k")).cors_origins == ("*",)


class TestOtherSitesOfAServerWithoutAKey:
    async def test_named_pages_may_ask_and_no_others(self, tmp_path: Path, settings: Settings, client: httpx.AsyncClient
                                                    ) -> None:
        assert (await client.options(CHAT, headers=TestOtherSites.ASKS)).status_code in (403, 405)
        assert (await client.post(CHAT, json=chat(), headers=TestOtherSites.PAGE)).status_code == 403

    class TestWithThem:
        @pytest.fixture
        def settings(self, tmp_path: Path) -> Settings:
            return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", cors_origins=("https://app.example",))

        async def test_named_pages(self, client: httpx.AsyncClient) -> None:
            cross = {**TestOtherSites.PAGE, "Sec-Fetch-Site": "cross-site"}
            assert (await client.post(CHAT, json=chat(), headers=cross)).status_code == 200
            evil = {"Origin": "https://evil.example"}
            assert (await client.post(CHAT, json=chat(), headers=evil)).status_code == 403


async def test_tokens_are_told_with_their_text_and_the_turn_they_are_in(client: httpx.AsyncClient) -> None:
    messages = [{"role": "system", "content": "good"}, {"role": "user", "content": "hello"}]
    found = (await client.post("/v1/tokenize", json={"messages": messages, "return_token_strs": True,
                                                     "return_token_roles": True})).json()
    turns = dict(zip(found["token_strs"], found["token_roles"], strict=True))
    assert turns["hello"] == "user" and turns["<|system|>"] == "system" and len(found["tokens"]) == found["count"]
    plain = (await client.post("/v1/tokenize", json={"prompt": "hello", "return_token_roles": True})).json()
    assert "token_roles" not in plain
