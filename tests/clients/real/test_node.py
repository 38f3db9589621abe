"""Clients for Node: OpenAI's package, and Vercel's AI SDK with a loop of tools."""

import json
from collections.abc import Callable
from typing import Any

from tests.agents import EVERYWHERE, LEFT_ALONE, as_told, hardest, spec
from tests.clients.real.conftest import STEERING


def test_openai_node(drive: Callable[..., Any]) -> None:
    found = drive("node", "openai_node.mjs", json.dumps(STEERING))
    assert found["steered"] == found["streamed"] == found["response"] != found["plain"]
    assert found["receipt"]["prompt"] > 0 and found["response_receipt"] == found["receipt"]
    assert found["header"].startswith('"inline";op=add;prompt=') and found["refused"] == "model_not_found"


def test_vercel_ai(drive: Callable[..., Any], tools_url: str) -> None:
    episode = hardest()
    given = (json.dumps(STEERING), tools_url, json.dumps(as_told(episode)))
    found = drive("node", "vercel_ai.mjs", *given, json.dumps(spec(LEFT_ALONE)))
    assert found["steered"] == found["streamed"] != found["plain"]
    assert found["receipt"]["prompt"] > 0 and found["header"].startswith('"inline";op=add')
    wanted = [list(turn.call) for turn in episode.turns if turn.call is not None]
    assert found["calls"] == wanted
    assert episode.turns[-1].said in found["text"]
    # The control: where the scope leaves nothing alone, the same vector breaks calls.
    assert drive("node", "vercel_ai.mjs", *given, json.dumps(spec(EVERYWHERE)))["calls"] != wanted
