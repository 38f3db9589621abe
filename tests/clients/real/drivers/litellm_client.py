"""litellm's package: a chat, streamed and whole, a text completion, a response; steering goes through extra_body."""

import json
import sys

import litellm

url, steering = sys.argv[1], json.loads(sys.argv[2])
litellm.telemetry = False
common = {"api_base": f"{url}/v1", "api_key": "unused", "max_tokens": 16, "temperature": 0.0}
messages = [{"role": "user", "content": "How do I bake a cake?"}]


def chat(**fields):
    return litellm.completion(model="openai/lab-dense", messages=messages, **common, **fields)


plain, steered = chat(), chat(extra_body={"steering": steering})
chunks = chat(extra_body={"steering": steering}, stream=True)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
response = litellm.responses(model="openai/lab-dense", input="How do I bake a cake?", api_base=f"{url}/v1",
                             api_key="unused", max_output_tokens=16, temperature=0.0,
                             extra_body={"steering": steering})
try:
    litellm.completion(model="openai/lab-dense", messages=[{"role": "user", "content": "x " * 4000}], **common)
    refused = None
except litellm.ContextWindowExceededError:
    refused = "context"
print(json.dumps({
    "plain": plain.choices[0].message.content, "steered": steered.choices[0].message.content, "streamed": streamed,
    "response": response.output[-1].content[0].text, "id": steered.id, "refused": refused}))
