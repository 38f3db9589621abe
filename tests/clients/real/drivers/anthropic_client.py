"""Anthropic's package: whole, streamed, counted, a key in its own header, an error of its own kind."""

import json
import sys

import anthropic

url, steering = sys.argv[1], json.loads(sys.argv[2])
client = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0)
fields = {"model": "lab-dense", "max_tokens": 16, "system": "Be kind.",
          "messages": [{"role": "user", "content": "How do I bake a cake?"}]}
# Newer versions of the package have no name for the temperature.
cold = {"temperature": 0.0}
plain = client.messages.create(**fields, extra_body=cold)
steered = client.messages.create(**fields, extra_body={**cold, "steering": steering})
with client.messages.stream(**fields, extra_body={**cold, "steering": steering}) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
counted = client.messages.count_tokens(model="lab-dense", system="Be kind.", messages=fields["messages"])
raw = client.messages.with_raw_response.create(**fields, extra_body={**cold, "steering": steering})
try:
    client.messages.create(**{**fields, "model": "nothing"})
    refused = None
except anthropic.NotFoundError as error:
    refused = error.body["error"]["type"]
print(json.dumps({
    "plain": plain.content[0].text, "steered": steered.content[0].text, "streamed": text,
    "final": final.content[0].text, "stop": [plain.stop_reason, final.stop_reason],
    "counted": counted.input_tokens,
    "prompt": plain.usage.input_tokens + plain.usage.cache_read_input_tokens,
    "receipt": steered.model_extra["steering"]["applied"][0]["tokens"], "header": raw.headers["x-trimtab-applied"],
    "refused": refused}))
