"""What litellm's proxy gives to clients that know only it: chats, messages, responses.

Arguments: address of the proxy, steering as JSON, the key of the proxy.
"""

import json
import sys

import anthropic
import openai

url, steering, key = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
ours = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
theirs = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
messages = [{"role": "user", "content": "How do I bake a cake?"}]


def chat(model, **more):
    return ours.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0, **more)


plain, steered = chat("plain"), chat("steered")
field = chat("plain", extra_body={"steering": steering})
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chat("steered", stream=True) if chunk.choices)
response = ours.responses.create(model="steered", input=messages[0]["content"], max_output_tokens=16, temperature=0)
message = theirs.messages.create(model="steered", messages=messages, max_tokens=16, extra_body={"temperature": 0.0})
print(json.dumps({
    "plain": plain.choices[0].message.content, "steered": steered.choices[0].message.content, "streamed": streamed,
    "field": field.choices[0].message.content, "id": steered.id, "response": response.output_text,
    "message": message.content[0].text}))
