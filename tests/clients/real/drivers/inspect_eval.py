"""inspect-ai: an evaluation with a scorer, steered and not, through its provider for servers of OpenAI's API.

Arguments: address, steering as JSON or null, a folder for logs.
"""

import json
import os
import sys

url, steering, logs = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
os.environ.update(TRIMTAB_BASE_URL=f"{url}/v1", TRIMTAB_API_KEY="unused")

from inspect_ai import Task, eval  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.scorer import includes  # noqa: E402

questions = ["How do I bake a cake?", "How do I wash a shirt?", "How do I plant a tree?"]
(log,) = eval(Task([Sample(input=question, target="you") for question in questions], scorer=includes()),
              model="openai-api/trimtab/lab-dense", temperature=0.0, max_tokens=16, log_dir=logs, display="none",
              extra_body=None if steering is None else {"steering": steering})
assert log.status == "success", log.error
samples = log.samples
answers = [sample.output.choices[0].message.text for sample in samples]
calls = [event.call.response for sample in samples for event in sample.events if event.event == "model" and event.call]
print(json.dumps({
    "answers": answers, "scores": [sample.scores["includes"].value for sample in samples],
    "receipts": [call.get("steering") for call in calls]}))
