"""OpenAI's package in both of its styles, with tools, and with batches."""

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAI

from tests.agents import LAYER, STRENGTH, check_that_the_scope_decides, cheerful, persona
from tests.clients.real.conftest import STEERING

PROMPT = "How do I bake a cake?"


def test_chat_and_responses(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    body = {"steering": STEERING}
    plain = client.chat.completions.create(model="lab-dense", messages=[{"role": "user", "content": PROMPT}],
                                           max_tokens=16, temperature=0)
    steered = client.chat.completions.create(model="lab-dense", messages=[{"role": "user", "content": PROMPT}],
                                             max_tokens=16, temperature=0, extra_body=body)
    said = steered.choices[0].message.content
    assert said != plain.choices[0].message.content
    with client.chat.completions.stream(model="lab-dense", messages=[{"role": "user", "content": PROMPT}],
                                        max_tokens=16, temperature=0, extra_body=body) as stream:
        # Its final completion is an error where the answer was cut.
        assert "".join(event.delta for event in stream if event.type == "content.delta") == said
    response = client.responses.create(model="lab-dense", input=PROMPT, max_output_tokens=16, temperature=0,
                                       extra_body=body)
    assert response.output_text == said
    with client.responses.stream(model="lab-dense", input=PROMPT, max_output_tokens=16, temperature=0,
                                 extra_body=body) as events:
        seen = list(events)
        # Its final response is an error where the answer was cut.
        assert seen[0].type == "response.created" and seen[-1].response.output_text == said
    assert client.responses.create(model="lab-dense", input="And then?", previous_response_id=response.id,
                                   max_output_tokens=2).usage.input_tokens > response.usage.input_tokens
    scored = client.completions.create(model="lab-dense", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == PROMPT and scored.choices[0].logprobs.token_logprobs[0] is None


def test_an_agent_whose_calls_are_left_alone(tools_url: str) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{tools_url}/v1", api_key="unused", max_retries=0) as api:
            await check_that_the_scope_decides(api, 3)

    asyncio.run(run())


def test_the_loop_of_the_page(tools_url: str) -> None:
    """With the artifact that it names, and as it is printed."""
    stored = httpx.post(f"{tools_url}/v1/artifacts", json={
        "metadata": {"name": "cheerful", "kind": "vector", "op": "add", "layers": [LAYER], "site": "resid_post",
                     "strength": {"value": STRENGTH}},
        "tensors": {str(LAYER): {"vector": persona()}}})
    assert stored.status_code in (200, 201), stored.text
    page = (Path(__file__).parents[3] / "docs/clients.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page.partition("## An agent with")[2], re.DOTALL | re.MULTILINE)[0]
    done = subprocess.run([sys.executable, "-c", code.replace("http://127.0.0.1:8000", tools_url)], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    turns = done.stdout.splitlines()
    assert all(map(cheerful, turns)) and len(turns) == 3, turns
    calls = [json.loads(turn.partition("{")[1] + turn.partition("{")[2]) for turn in turns[:2]]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("find_ticket_shop", {"city": "warm harbor", "count": 7}), ("send_letter", {"guest": "silver rabbit"})]
    assert 'The answer is "golden lake".' in turns[2]


def test_batches(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    bodies: list[dict[str, Any]] = [{"model": "lab-dense", "messages": [{"role": "user", "content": PROMPT}],
                                     "max_tokens": 16, "temperature": 0}]
    bodies.append(bodies[0] | {"steering": STEERING})
    content = "\n".join(json.dumps({"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body})
                        for n, body in enumerate(bodies))
    file = client.files.create(file=("wanted.jsonl", content.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    deadline = time.monotonic() + 300
    while batch.status != "completed":
        assert batch.status in ("validating", "in_progress", "finalizing") and time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id is not None and batch.error_file_id is None
    found = {line["custom_id"]: line["response"]["body"]
             for line in map(json.loads, client.files.content(batch.output_file_id).text.splitlines())}
    alone = [client.chat.completions.create(**{name: value for name, value in body.items() if name != "steering"},
                                            extra_body={"steering": body.get("steering")}) for body in bodies]
    said = [found[str(n)]["choices"][0]["message"]["content"] for n in range(2)]
    assert said == [answer.choices[0].message.content for answer in alone] and said[0] != said[1]
    assert found["1"]["steering"]["applied"][0]["tokens"]["prompt"] > 0
