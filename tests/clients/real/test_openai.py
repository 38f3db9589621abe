"""OpenAI's package in both of its styles."""

from openai import OpenAI

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
