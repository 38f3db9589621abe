"""langchain-openai, as agents of langgraph use it."""

import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.clients.real.conftest import STEERING


def test_text(drive: Callable[..., Any], url: str) -> None:
    found = drive("langgraph", "langchain_client.py", json.dumps(STEERING))
    assert found["steered"] == found["streamed"] != found["plain"]
    assert found["header"].startswith('"inline";op=add;prompt=')
    assert httpx.get(f"{url}/v1/receipts/{found['id']}").json()["applied"][0]["tokens"]["prompt"] > 0
