"""litellm's package, which keeps an answer's id and drops its receipt."""

import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.clients.real.conftest import STEERING


def test_chat_and_responses(drive: Callable[..., Any], url: str) -> None:
    found = drive("sdks", "litellm_client.py", json.dumps(STEERING))
    assert found["steered"] == found["streamed"] == found["response"] != found["plain"]
    assert found["refused"] == "context"
    receipt = httpx.get(f"{url}/v1/receipts/{found['id']}").json()
    assert receipt["applied"][0]["tokens"]["prompt"] > 0
