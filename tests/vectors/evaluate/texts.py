"""tests/data/graded_texts.jsonl: what SmolLM2 and the lab models wrote, untouched, instructed, too hot and pushed by
random vectors, read and labelled by hand.

label: refusal, compliance or broken. language: of a whole text. sentiment: of whole reviews. sure: no doubt which label
is right. surprise: mean nats per token under the untouched model; usual: the median of its own answers to such prompts,
drawn at a like temperature, rounded. part: rules and limits were chosen on `fit`; shares are stated on `test`.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "data" / "graded_texts.jsonl"


@lru_cache(maxsize=1)
def texts() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines())


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)
