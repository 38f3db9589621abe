"""A stream that has nothing to say yet says that it is there, and nothing else about it changes."""

import asyncio
from pathlib import Path

import httpx
import pytest

from server.settings import Settings
from steering.language.errors import TrimtabError
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine

CHAT, COMMENT = "/v1/chat/completions", ": keep-alive"


class TestASilentStream:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", keep_alive_s=0.05)

    async def test_it_begins_and_is_kept_open(self, address: str, engine: ScriptedEngine) -> None:
        engine.gate = asyncio.Event()
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            async with client.stream("POST", CHAT, json=chat(stream=True)) as response:
                lines = response.aiter_lines()
                # Twice before the first token, and twice after it.
                for _ in range(2):
                    await self.comments(lines, 2)
                    engine.gate.set()
                    engine.gate = asyncio.Event()
                    line = ""
                    while not line.startswith("data: {"):
                        line = await anext(lines)
                engine.gate.set()
                rest = [line async for line in lines if line]
            assert response.status_code == 200 and rest[-1] == "data: [DONE]"

    async def comments(self, lines: object, count: int) -> None:
        while count:
            count -= await anext(lines) == COMMENT  # type: ignore[call-overload]

    async def test_what_fails_after_the_beginning_is_its_last_event(self, address: str, engine: ScriptedEngine) -> None:
        engine.gate, engine.fails_at, engine.failure = asyncio.Event(), 0, TrimtabError("the engine fell over")
        async with httpx.AsyncClient(base_url=address, timeout=30) as client, client.stream(
                "POST", CHAT, json=chat(stream=True)) as response:
            lines = response.aiter_lines()
            await self.comments(lines, 1)
            engine.gate.set()
            rest = [line async for line in lines if line.startswith("data")]
        assert response.status_code == 200
        assert "the engine fell over" in rest[0] and rest[1:] == ["data: [DONE]"]

    async def test_a_client_that_leaves_before_the_first_token_leaves_nothing(self, address: str,
                                                                             engine: ScriptedEngine) -> None:
        engine.gate = asyncio.Event()
        async with httpx.AsyncClient(base_url=address, timeout=30) as client, client.stream(
                "POST", CHAT, json=chat(stream=True)) as response:
            await self.comments(response.aiter_lines(), 1)
        async with asyncio.timeout(30):
            await engine.completions[0].cancelled.wait()


async def test_one_that_fails_at_once_still_has_its_status(address: str, engine: ScriptedEngine) -> None:
    engine.fails_at, engine.failure = 0, TrimtabError("the engine fell over")
    async with httpx.AsyncClient(base_url=address, timeout=30) as client:
        answer = await client.post(CHAT, json=chat(stream=True))
    assert answer.status_code == 500 and COMMENT not in answer.text


async def test_one_that_is_not_silent_has_no_comments(address: str) -> None:
    async with httpx.AsyncClient(base_url=address, timeout=30) as client:
        answer = await client.post(CHAT, json=chat(stream=True))
    assert answer.text.endswith("data: [DONE]\n\n") and COMMENT not in answer.text
