"""langchain-openai, and an agent of langgraph with a loop of tools: right with a persona that leaves calls alone, wrong
where it does not."""

import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.agents import EVERYWHERE, LEFT_ALONE, as_told, cheerful, hardest, spec
from tests.clients.real.conftest import STEERING


def test_text_and_an_agent(drive: Callable[..., Any], url: str, tools_url: str) -> None:
    episode = hardest()
    wanted = [list(turn.call) for turn in episode.turns if turn.call is not None]
    given = (json.dumps(STEERING), tools_url, json.dumps(as_told(episode)))
    found = drive("langgraph", "langgraph_agent.py", *given, json.dumps(spec(LEFT_ALONE)))
    assert found["steered"] == found["streamed"] != found["plain"]
    assert found["header"].startswith('"inline";op=add;prompt=')
    assert httpx.get(f"{url}/v1/receipts/{found['id']}").json()["applied"][0]["tokens"]["prompt"] > 0
    assert found["calls"] == wanted and episode.turns[-1].said in found["text"]
    assert all(map(cheerful, found["steps"]))
    unsteered = drive("langgraph", "langgraph_agent.py", *given, "null")
    assert unsteered["calls"] == wanted and not any(map(cheerful, unsteered["steps"]))
    assert drive("langgraph", "langgraph_agent.py", *given, json.dumps(spec(EVERYWHERE)))["calls"] != wanted
