"""lm-evaluation-harness on tasks of a local file: its own Hugging Face backend, or `local-completions`.

Arguments: address, "hf" or "api", model folder, folder of tasks, steering as JSON or null (layer and vector are read of
it for the Hugging Face backend, which has a plain hook in its place).
"""

import json
import sys

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

url, backend, folder, tasks = sys.argv[1:5]
steering = json.loads(sys.argv[5])


class Steered(LocalCompletionsAPI):
    def _create_payload(self, *args, **kwargs):
        return super()._create_payload(*args, **kwargs) | ({} if steering is None else {"steering": steering})


if backend == "hf":
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", max_length=511, add_bos_token=False, batch_size=4)
    if steering is not None:
        (item,) = steering["interventions"]
        push = torch.tensor(item["inline"]["vector"])
        model.model.model.layers[item["layers"][0]].register_forward_hook(
            lambda module, given, out: (out[0] + push, *out[1:]) if isinstance(out, tuple) else out + push)
else:
    model = Steered(base_url=f"{url}/v1/completions", model="lab-dense", tokenizer=folder, max_length=511,
                    tokenizer_backend="huggingface", batch_size=4, num_concurrent=2)
out = lm_eval.simple_evaluate(model=model, tasks=["trimtab_choice", "trimtab_rolling"], log_samples=True,
                              task_manager=TaskManager(include_path=tasks, include_defaults=False))
found = {task: [[float(number) for answer in sample["filtered_resps"]
                 for number in (answer if isinstance(answer, (list, tuple)) else [answer])]
                for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
         for task, samples in out["samples"].items()}
print(json.dumps({"samples": found, "accuracy": out["results"]["trimtab_choice"]["acc,none"]}))
