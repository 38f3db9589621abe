"""langchain-openai: text, whole and streamed; the receipt is in the headers, which the metadata hold.

Arguments: address, steering as JSON.
"""

import json
import sys

from langchain_openai import ChatOpenAI

url, steering = sys.argv[1], json.loads(sys.argv[2])
question = "How do I bake a cake?"


def model(**fields):
    return ChatOpenAI(base_url=f"{url}/v1", api_key="unused", model="lab-dense", temperature=0, max_tokens=16,
                      max_retries=0, include_response_headers=True, **fields)


plain, steered = model().invoke(question), model(extra_body={"steering": steering}).invoke(question)
streamed = "".join(chunk.content for chunk in model(extra_body={"steering": steering}).stream(question))
headers = steered.response_metadata["headers"]
print(json.dumps({"plain": plain.content, "steered": steered.content, "streamed": streamed,
                  "id": headers["x-trimtab-request"], "header": headers["x-trimtab-applied"]}))
