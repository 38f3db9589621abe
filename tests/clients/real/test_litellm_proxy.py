"""litellm's proxy in front of the server: its chats, messages and responses are steered by its configuration, or by the
field in a chat."""

import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.real.conftest import OFFLINE, STEERING, environment, running

# It does not start without one.
KEY = f"sk-{secrets.token_hex(32)}"


@pytest.fixture
def proxy(url: str, tmp_path: Path) -> Iterator[str]:
    def entry(name: str, **more: Any) -> dict[str, Any]:
        return {"model_name": name, "litellm_params": {"model": "openai/lab-dense", "api_base": f"{url}/v1",
                                                       "api_key": "unused", **more}}

    # JSON is YAML.
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"model_list": [entry("plain"), entry("steered", extra_body={"steering": STEERING})]}))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(environment("proxy") / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port",
               str(port)]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    address = f"http://127.0.0.1:{port}"
    with running(command, address, tmp_path / "log", path="/health/liveliness", cwd=tmp_path,
                 env=outside | OFFLINE | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": KEY}):
        yield address


def test_chat_messages_and_responses(drive: Callable[..., Any], proxy: str, url: str) -> None:
    found = drive("proxy", "proxy_client.py", json.dumps(STEERING), KEY, first=proxy)
    assert found["field"] == found["steered"] == found["streamed"] != found["plain"]
    assert found["response"] == found["message"] == found["steered"]
    receipt = httpx.get(f"{url}/v1/receipts/{found['id']}").json()
    assert receipt["applied"][0]["tokens"]["prompt"] > 0
