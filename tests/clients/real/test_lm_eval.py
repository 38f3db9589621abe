"""lm-evaluation-harness: `local-completions` has the numbers of its own Hugging Face backend."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.real.conftest import STEERING

WORDS = "sun moon cake film lovely dreadful day night bread river walk".split()
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
CHOICE = """doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Multiple choice, and texts of which the last is longer than the context."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(3)
    choices = [{"question": "Review: the " + " ".join(draw.choices(WORDS, k=5)), "answer": draw.randrange(3),
                "choices": [" " + " ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(3)]}
               for _ in range(12)]
    texts = [{"text": "The " + " ".join(draw.choices(WORDS, k=count)) + "."} for count in (5, 60, 400)]
    for name, kind, documents, rest in (("trimtab_choice", "multiple_choice", choices, CHOICE),
                                        ("trimtab_rolling", "loglikelihood_rolling", texts, ROLLING)):
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, documents)))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, data=data) + rest)
    return str(folder)


def numbers(found: Any) -> list[float]:
    return [number for task in sorted(found["samples"]) for sample in found["samples"][task] for number in sample]


def test_the_numbers_of_its_own_backend(drive: Callable[..., Any], model_folder: str, tasks: Path) -> None:
    told = {}
    for steering in (None, STEERING):
        given = (model_folder, str(tasks), json.dumps(steering))
        own, ours = (drive("lm-eval", "lm_eval_client.py", backend, *given) for backend in ("hf", "api"))
        assert numbers(ours) == pytest.approx(numbers(own), abs=1e-3)
        assert ours["accuracy"] == own["accuracy"]
        told[steering is None] = numbers(ours)
    # The control: the vector moves them by far more.
    assert max(abs(a - b) for a, b in zip(*told.values(), strict=True)) > 1
