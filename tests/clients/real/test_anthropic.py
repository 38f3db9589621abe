"""Anthropic's package."""

import json
from collections.abc import Callable
from typing import Any

from tests.clients.real.conftest import STEERING


def test_messages(drive: Callable[..., Any]) -> None:
    found = drive("sdks", "anthropic_client.py", json.dumps(STEERING))
    assert found["steered"] == found["streamed"] == found["final"] != found["plain"]
    assert set(found["stop"]) <= {"max_tokens", "end_turn"}
    assert found["counted"] == found["prompt"] == found["receipt"]["prompt"]
    assert found["header"].startswith('"inline";op=add;prompt=')
    assert found["refused"] == "not_found_error"
